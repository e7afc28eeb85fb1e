// How many units have which value, and the threshold from which they are marked in the text.

import { counted, make, whole } from "./make.js";
import { edgeOfMost, histogramOf, paint } from "./modes.js";

// onThreshold(value): the visitor has chosen another one.
export function makeHistogram({ onThreshold }) {
  const bars = make("div", { class: "bars", "aria-hidden": "true" });
  const slider = make("input", { type: "range", min: 0, step: 1, "aria-label": "Mark from" });
  const told = make("output");
  const caption = make("figcaption");
  const figure = make("figure", { class: "histogram" }, caption, bars, slider, told);
  let drawn = null;

  // The values of all units that are scored; `kind` names one of them. The threshold goes to where
  // about a tenth of them is marked.
  function draw(mode, values, kind) {
    const counts = histogramOf(mode, values);
    const most = Math.max(1, ...counts);
    drawn = { mode, values, kind };
    caption.replaceChildren(make("strong", {}, `How many ${kind}s`), ` by ${mode.name}`);
    bars.replaceChildren(
      ...counts.map((count, i) => {
        const bar = make("i", { title: `${mode.labelOf(mode.edges[i])}: ${counted(count, kind)}` });
        bar.style.height = `${(100 * count) / most}%`;
        paint(bar, mode, mode.edges[i]);
        const label = mode.steps.includes(mode.edges[i]) ? mode.labelOf(mode.edges[i]) : "";
        return make("span", {}, bar, make("small", {}, label));
      }),
    );
    slider.max = mode.edges.length - 1;
    slider.value = edgeOfMost(mode, values);
    return threshold();
  }

  function threshold() {
    const { mode, values, kind } = drawn;
    const isAll = slider.value === "0"; // the first bin has also what is below its edge
    const edge = isAll ? -Infinity : mode.edges[slider.value];
    const from = isAll ? "everything" : mode.atLeast(edge);
    const marked = values.filter((value) => value >= edge).length;
    const share = `${whole(marked)} of ${counted(values.length, kind)}`;
    told.textContent = `Underlined: ${from}, ${share}`;
    slider.setAttribute("aria-valuetext", from);
    return edge;
  }
  slider.addEventListener("input", () => onThreshold(threshold()));

  return { figure, draw };
}

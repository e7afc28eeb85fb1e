// The most surprising places of a text, as a list of buttons that lead to them.

import { counted, fixed, make, quoted, shortened } from "./make.js";

const MOST_SPANS = 8;
const MOST_CHARACTERS = 48;

// onGo(i): the visitor wants to see unit i.
export function makeSpans({ onGo }) {
  const list = make("ol");
  const title = make("h2");
  const section = make("section", { class: "spans" }, title, list);

  // A span is a run of units that are marked: those with a value of at least the threshold.
  function draw(units, values, threshold) {
    const spans = spansOf(units, values, threshold);
    const count = counted(spans.length, "underlined span");
    title.textContent = spans.length > 1 ? `${count}, the most surprising first` : count;
    list.replaceChildren(
      ...spans.slice(0, MOST_SPANS).map(({ first, text, bits, count }) => {
        const button = make(
          "button",
          { type: "button" },
          make("bdi", {}, quoted(shortened(text.trim() || text, MOST_CHARACTERS))),
          ` ${fixed(bits, 1)} bits`,
          ...(count > 1 ? [` in ${counted(count, "token")}`] : []),
        );
        button.addEventListener("click", () => onGo(first));
        return make("li", {}, button);
      }),
    );
  }
  return { section, draw };
}

// The runs of marked units, those with the most bits first.
function spansOf(units, values, threshold) {
  const spans = [];
  let open = null;
  units.forEach((unit, i) => {
    if (values[i] === null || values[i] < threshold) {
      open = null;
      return;
    }
    if (open === null) spans.push((open = { first: i, text: "", bits: 0, count: 0 }));
    open.text += unit.text;
    open.bits += unit.total;
    open.count += unit.count;
  });
  return spans.toSorted((a, b) => b.bits - a.bits);
}

// The view of one score: the text with its colours, the figures of one unit, a chart, a histogram,
// the most surprising spans, and files. What is pointed at or pinned in one is so in the others.

import { makeChart, positionsChart } from "./chart.js";
import { makeFiles, tableOf } from "./files.js";
import { makeHistogram } from "./histogram.js";
import { make } from "./make.js";
import { legendOf, MODES } from "./modes.js";
import { linesOf, makePanel } from "./panel.js";
import { makeSpans } from "./spans.js";
import { closeTooltipsByEscape, makeText } from "./text.js";
import { isMean, kindsOf, unitsOf } from "./units.js";

export function makeScoreView() {
  let score, units, values, pinned;
  const modes = Object.entries(MODES).map(([value, { name }]) => make("option", { value }, name));
  const colourBy = make("select", { "aria-label": "Colour by" }, ...modes);
  const kindChoice = make("select", { "aria-label": "of each" });
  const steps = make("span", { class: "steps" });
  const controls = make(
    "p",
    { class: "controls" },
    make("label", {}, "Colour by ", colourBy),
    make("label", {}, "of each ", kindChoice),
    steps,
  );

  const text = makeText({
    tooltipOf: (i) => linesOf(units[i], kindChoice.value, score),
    onPoint: point,
    onPin: pin,
  });
  const { panel, show } = makePanel();
  const chart = makeChart({ onPoint: point, onPin: go });
  const histogram = makeHistogram({ onThreshold: colour });
  const spans = makeSpans({ onGo: go });
  const positions = make("details", {}, make("summary", {}, "By position in the context"));
  const figures = make("details", {}, make("summary", {}, "All figures"));
  const article = make(
    "article",
    { class: "surprisal", "aria-label": "Result" },
    controls,
    text.box,
    panel,
    chart.figure,
    make("div", { class: "columns" }, histogram.figure, spans.section),
    makeFiles("score", () => score, tableOf),
    positions,
    figures,
  );
  closeTooltipsByEscape(article);

  // The JSON of a score. What the visitor had chosen to see stays, where this score has it.
  function draw(newScore) {
    score = newScore;
    const chosen = kindChoice.value;
    const kinds = kindsOf(score);
    kindChoice.replaceChildren(...kinds.map((kind) => make("option", { value: kind }, kind)));
    if (kinds.includes(chosen)) kindChoice.value = chosen;
    positions.hidden = Object.keys(score.positions).length === 0;
    positions.replaceChildren(positions.firstChild, positionsChart(score.positions));
    figures.replaceChildren(figures.firstChild, listOf(score.result));
    drawUnits();
    // At first, the most surprising one.
    const bitsOf = (i) => units[i].bits ?? -1;
    if (units.length) pin(units.reduce((best, _, i) => (bitsOf(i) > bitsOf(best) ? i : best), 0));
  }

  function drawUnits() {
    const kind = kindChoice.value;
    const large = kindsOf(score).find(isMean);
    units = unitsOf(score, kind);
    text.draw(units);
    chart.draw(units, kind, large ? unitsOf(score, large) : []);
    drawColours();
  }

  function drawColours() {
    const mode = MODES[colourBy.value];
    values = units.map(mode.valueOf);
    steps.replaceChildren(...legendOf(mode));
    colour(
      histogram.draw(
        mode,
        values.filter((value) => value !== null),
        kindChoice.value,
      ),
    );
  }

  function colour(threshold) {
    text.colour(MODES[colourBy.value], values, threshold);
    spans.draw(units, values, threshold);
  }

  function point(i) {
    text.point(i);
    chart.point(i);
  }

  function pin(i) {
    pinned = i;
    text.pin(i);
    chart.pin(i);
    const before = units
      .slice(0, i)
      .map((unit) => unit.text)
      .join("");
    show(units[i], kindChoice.value, score, before);
  }

  // Show a place that the visitor cannot see yet.
  function go(i) {
    text.show(i);
    pin(i);
  }

  colourBy.addEventListener("change", drawColours);
  kindChoice.addEventListener("change", () => {
    const token = units[pinned]?.first;
    drawUnits();
    if (units.length) go(units.findIndex(({ stop }) => token < stop)); // the same place
  });
  return { article, draw };
}

// Names and values.
function listOf(result) {
  const rows = Object.entries(result).flatMap(([name, value]) => [
    make("dt", {}, name),
    make("dd", {}, value === null ? "undefined" : `${value}`),
  ]);
  return make("dl", {}, ...rows);
}

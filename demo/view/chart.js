// The surprisal along the text, or by the number of tokens that the model could see before.

import { counted, fixed, make, quoted, shortened } from "./make.js";
import { isMean } from "./units.js";

const HEIGHT = 150;
const MARGIN = { left: 30, right: 8, top: 20, bottom: 22 };
const PIXELS_OF_A_UNIT = 2; // of fewer, a line would be a solid block
const MOST_CHARACTERS = 40; // of a unit's text
const MEANS = 100; // windows of the running mean along a long text

// onPoint(i or null), onPin(i): as of a text; i is the number of a unit.
export function makeChart({ onPoint, onPin }) {
  const svg = make("svg", { role: "img", height: HEIGHT });
  const caption = make("figcaption");
  const figure = make("figure", { class: "chart" }, caption, svg);
  const marks = { pinned: null, pointed: null };
  let [drawn, scale] = [null, null];

  // `units` along the text, with `bands`, larger units behind them. `kind` names one of the units.
  function draw(units, kind, bands) {
    [drawn, scale] = [{ units, kind, bands }, null]; // no scale until it is drawn
    marks.pointed = null;
    redraw();
  }

  function redraw() {
    const width = svg.clientWidth || figure.clientWidth;
    if (!drawn || !width) return; // on a tab that is not shown
    const { units, kind, bands } = drawn;
    const isDense = (width - MARGIN.left) / units.length < PIXELS_OF_A_UNIT;
    const window = isDense ? Math.max(2, Math.round(units.length / MEANS)) : 1;
    const points = isDense ? runningMean(units, window) : units;
    drawn.points = points;
    const finite = points
      .flatMap(({ bits, entropy }) => [bits, isDense ? null : entropy])
      .filter(Number.isFinite);
    const most = roundUp(Math.max(1, ...finite), [1, 1.2, 1.6, 2, 3, 4, 6, 8, 10]);
    const tokens = units.at(-1)?.stop ?? 1;
    scale = {
      width,
      x: (token) => MARGIN.left + (token / tokens) * (width - MARGIN.left - MARGIN.right),
      y: (bits) =>
        HEIGHT -
        MARGIN.bottom -
        (Math.min(bits, most) / most) * (HEIGHT - MARGIN.top - MARGIN.bottom),
      tokenAt: (x) => ((x - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * tokens,
    };
    const each = `${isMean(kind) ? "mean of each" : "of each"} ${kind}`;
    const what = isDense ? `running mean of ${counted(window, kind)}` : each;
    caption.replaceChildren(
      make("strong", {}, "Surprisal along the text"),
      ` in bits, ${what}`,
      ...(isDense ? [] : ["; dashed: what the model expected (entropy)"]),
    );
    svg.setAttribute("aria-label", `Surprisal along the text in bits, ${what}`);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.replaceChildren(
      ...bandsOf(bands),
      ...axes(most, tokens),
      ...(isDense ? [] : [lineOf(units, "entropy", "expected")]),
      lineOf(points, "bits", "line"),
    );
    for (const name of Object.keys(marks)) mark(name, marks[name]);
  }

  const bandsOf = (bands) =>
    bands
      .filter((_, i) => i % 2 === 1)
      .map(({ first, stop }) =>
        make("rect", {
          class: "band",
          x: scale.x(first),
          width: scale.x(stop) - scale.x(first),
          y: MARGIN.top,
          height: HEIGHT - MARGIN.top - MARGIN.bottom,
        }),
      );

  function axes(most, tokens) {
    const [left, right] = [scale.x(0), scale.x(tokens)];
    const rows = [0, most / 2, most].map((bits) => [
      make("line", { class: "grid", x1: left, x2: right, y1: scale.y(bits), y2: scale.y(bits) }),
      make("text", { x: left - 5, y: scale.y(bits) + 4, "text-anchor": "end" }, `${bits}`),
    ]);
    const step = roundUp(Math.max(1, tokens / 8), [1, 2, 5, 10]);
    const columns = [];
    for (let token = 0; token <= tokens; token += step) {
      const anchor = token === 0 ? "start" : scale.x(token) > right - 12 ? "end" : "middle";
      columns.push(
        make("text", { x: scale.x(token), y: HEIGHT - 6, "text-anchor": anchor }, `${token}`),
      );
    }
    return [...rows.flat(), ...columns];
  }

  // A line through the middles of the units, with a gap where nothing is scored. What stands alone
  // between gaps, and each mean, is a line as long as its unit.
  function lineOf(points, name, style) {
    const isGap = (i) => (points[i]?.[name] ?? null) === null;
    const path = points.map((point, i) => {
      if (isGap(i)) return "";
      const y = scale.y(point[name]).toFixed(1);
      if (isMean(drawn.kind) || (isGap(i - 1) && isGap(i + 1))) {
        return `M${scale.x(point.first).toFixed(1)} ${y}H${scale.x(point.stop).toFixed(1)}`;
      }
      return `${isGap(i - 1) ? "M" : "L"}${scale.x(middleOf(point)).toFixed(1)} ${y}`;
    });
    return make("path", { class: style, d: path.join("") });
  }

  // Show where a unit is: a line, and for the one that is pointed at its text and figure.
  function mark(name, i) {
    marks[name] = i;
    svg.querySelector(`.${name}`)?.remove();
    const unit = drawn?.units[i];
    if (!unit || !scale) return;
    const x = scale.x(middleOf(unit));
    const line = make("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    const group = make("g", { class: name }, line);
    const height = drawn.points[i].bits; // of the line, which is a running mean in a long text
    if (height !== null) group.append(make("circle", { cx: x, cy: scale.y(height), r: 4 }));
    if (name === "pointed") {
      const isLeft = x < scale.width / 2;
      const bits = unit.bits === null ? "not scored" : `${fixed(unit.bits, 1)} bits`;
      const place = { x: x + (isLeft ? 6 : -6), y: 13, "text-anchor": isLeft ? "start" : "end" };
      group.append(
        make("text", place, `\u2068${quoted(shortened(unit.text, MOST_CHARACTERS))}\u2069 ${bits}`),
      );
    }
    svg.append(group);
  }

  const unitAt = (event) => {
    if (!scale || !drawn.units.length) return null;
    const token = scale.tokenAt(event.clientX - svg.getBoundingClientRect().left);
    const found = drawn.units.findIndex(({ stop }) => token < stop);
    return token < 0 ? null : found < 0 ? drawn.units.length - 1 : found;
  };
  svg.addEventListener("mousemove", (event) => onPoint(unitAt(event)));
  svg.addEventListener("mouseleave", () => onPoint(null));
  svg.addEventListener("click", (event) => unitAt(event) !== null && onPin(unitAt(event)));
  new ResizeObserver(redraw).observe(figure);

  return { figure, draw, pin: (i) => mark("pinned", i), point: (i) => mark("pointed", i) };
}

const middleOf = ({ first, stop }) => (first + stop) / 2;

// The mean over so many units around each that is scored.
function runningMean(units, window) {
  return units.map((unit, i) => {
    if (unit.bits === null) return unit;
    const first = Math.max(0, i - Math.floor(window / 2));
    const near = units.slice(first, first + window).filter(({ bits }) => bits !== null);
    return { ...unit, bits: near.reduce((total, { bits }) => total + bits, 0) / near.length };
  });
}

// The next value above that is a power of ten times one of the steps, the last of which is 10.
function roundUp(value, steps) {
  const power = 10 ** Math.floor(Math.log10(value));
  return steps.find((step) => step * power >= value) * power;
}

// The mean surprisal by the number of tokens that the model could see before, as bars.
export function positionsChart(positions) {
  const rows = Object.entries(positions);
  const most = Math.max(...rows.map(([, { bits }]) => Number(bits)).filter(Number.isFinite), 1);
  const bars = rows.map(([label, { bits, num_tokens: count }]) =>
    make(
      "li",
      { style: `--percent: ${Math.min(100, (100 * Number(bits)) / most).toFixed(1)}%` },
      make("span", {}, label.replace("-", "–")),
      make("span", {}, `${fixed(Number(bits), 1)} bits`),
      make("small", {}, counted(count, "token")),
    ),
  );
  return make("ol", { class: "positions", "aria-label": "Mean surprisal by context" }, ...bars);
}

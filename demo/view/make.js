// HTML and SVG elements, and values as people read them. What a visitor or a model wrote becomes a
// text node, never markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_KINDS = new Set(["svg", "g", "path", "rect", "line", "circle", "text"]);

// An element. `attributes` of null are left out; children are elements or texts.
export function make(kind, attributes = {}, ...children) {
  const made = SVG_KINDS.has(kind)
    ? document.createElementNS(SVG, kind)
    : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A text with its control characters made visible and harmless, as heatmap.py shows them.
export function visible(text, endsLines = false) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, (character) => {
    if (character === "\n") return endsLines ? "↵\n" : "↵";
    if (character === "\t") return endsLines ? "⇥\t" : "⇥";
    if (character < " ") return String.fromCodePoint(0x2400 + character.codePointAt(0));
    if (character === "\u200c" || character === "\u200d") return character; // of scripts, emoji
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `[U+${code}]`;
  });
}

export const quoted = (text) => `“${visible(text)}”`;

export function shortened(text, most) {
  const characters = Array.from(text);
  return characters.length > most ? `${characters.slice(0, most).join("")}…` : text;
}

// The probability of so many bits in per cent, with two significant digits.
export function percent(bits) {
  const value = 100 * 2 ** -bits;
  if (value >= 10) return `${Math.round(value)}%`;
  if (value >= 0.001) return `${Number(value.toPrecision(2))}%`;
  return `${value.toExponential(0)}%`;
}

// A number with so many decimals, and a real minus.
export function fixed(value, decimals = 2) {
  if (Number.isNaN(value)) return "undefined";
  if (!Number.isFinite(value)) return value > 0 ? "infinite" : "−infinite";
  return value
    .toFixed(decimals)
    .replace(/^-(?=.*[1-9])/, "−")
    .replace(/^-/, "");
}

export const whole = (value) => value.toLocaleString("en");

export const counted = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;

// A text in its box: each unit coloured, with a tooltip, and reached by mouse, touch and keys.
//
// It is one stop of the tab key; the arrow keys go on from there.

import { make, visible } from "./make.js";
import { paint } from "./modes.js";

// tooltipOf(i): the lines of a unit's tooltip. onPoint(i or null): the mouse or the focus is there.
// onPin(i): it was clicked, or chosen by Enter or the space bar.
export function makeText({ tooltipOf, onPoint, onPin }) {
  const box = make("div", { class: "text" });
  let spans = [];
  let numbers = new Map(); // of the spans
  let [hovered, focused] = [null, null];

  const numberOf = (target) => numbers.get(target.closest?.("b")) ?? null;

  function draw(units) {
    spans = units.map(() => make("b", { tabindex: -1 }));
    numbers = new Map(spans.map((span, i) => [span, i]));
    [hovered, focused] = [null, null];
    if (spans.length) spans[0].tabIndex = 0;
    box.removeAttribute("dir"); // or the browser would work it out again for each child
    box.replaceChildren(
      ...units.flatMap(({ text }, i) => {
        // Spaces have no colour: they would hang out of a line at its end.
        const [, before, inked, after] = text.match(/^( *)([^]*?)( *)$/);
        spans[i].textContent = visible(inked || text, true) || "·"; // a token without a place
        return inked ? [before, spans[i], after] : [spans[i]];
      }),
    );
    box.dir = "auto";
  }

  // Values of null are not scored; those at the threshold or above are marked.
  function colour(mode, values, threshold) {
    spans.forEach((span, i) => {
      paint(span, mode, values[i]);
      span.classList.toggle("marked", values[i] !== null && values[i] >= threshold);
    });
  }

  const only = (name, i) => {
    for (const old of [...box.getElementsByClassName(name)]) old.classList.remove(name);
    spans[i]?.classList.add(name);
  };

  function show(i) {
    // Of the box alone; scrollIntoView would scroll the page as well.
    const [place, frame] = [spans[i].getBoundingClientRect(), box.getBoundingClientRect()];
    if (place.top >= frame.top && place.bottom <= frame.bottom) return;
    box.scrollTop += place.top - frame.top - frame.height / 3;
  }

  // One tooltip at a time: of where the mouse or the focus came last.
  function tell() {
    const i = hovered ?? focused;
    if (i !== null) spans[i].dataset.tip = tooltipOf(i).join("\n");
    only("tipped", i);
    onPoint(i);
  }
  // subtle: what appears under a mouse at rest gets events too, from the same place.
  let place = null;
  box.addEventListener("mousemove", (event) => {
    const old = place;
    place = `${event.clientX} ${event.clientY}`;
    if (place === old || hovered === numberOf(event.target)) return;
    hovered = numberOf(event.target);
    tell();
  });
  box.addEventListener("mouseleave", () => {
    hovered = null;
    tell();
  });
  box.addEventListener("focusout", () => {
    focused = null;
    tell();
  });
  box.addEventListener("focusin", ({ target }) => {
    focused = numberOf(target);
    hovered = null; // the mouse may rest on another
    tell();
    if (focused === null) return;
    for (const old of box.querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
    spans[focused].tabIndex = 0; // the tab key comes back to it
  });
  box.addEventListener(
    "click",
    ({ target }) => numberOf(target) !== null && onPin(numberOf(target)),
  );
  box.addEventListener("keydown", (event) => {
    const i = numberOf(event.target);
    if (i === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const forwards = getComputedStyle(spans[i]).direction === "rtl" ? -1 : 1;
    const to = {
      ArrowLeft: i - forwards,
      ArrowRight: i + forwards,
      Home: 0,
      End: spans.length - 1,
    }[event.key];
    if (event.key === "Enter" || event.key === " ") onPin(i);
    else if (to !== undefined) spans[to]?.focus();
    else return;
    event.preventDefault();
  });

  return {
    box,
    draw,
    colour,
    show,
    span: (i) => spans[i],
    pin: (i) => only("pinned", i),
    point: (i) => only("pointed", i),
  };
}

// Escape closes a tooltip inside of `element`, wherever the focus is, until the mouse or the focus
// moves.
export function closeTooltipsByEscape(element) {
  const quiet = (is) => element.classList.toggle("quiet", is);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && quiet(true));
  element.addEventListener("focusin", () => quiet(false));
  element.addEventListener("mousemove", (event) => {
    if (event.movementX || event.movementY) quiet(false);
  });
}

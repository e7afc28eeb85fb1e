// Of a heatmap, whose place is `element`: the keys, and the panel that keeps the figures of one piece,
// a token or a word. Gradio calls this when the page opens; `watch` tells of every new result.

const tab = element.closest("[role=tabpanel]");
const pieceAt = (target) => target.closest?.(".surprisal b");

// What the page announces, and what its chart is called; Gradio says neither.
tab.querySelector(".verdict").setAttribute("role", "status");
new MutationObserver(() => {
  for (const chart of tab.querySelectorAll('[aria-label="Vega visualization"]')) {
    const title = chart.closest(".chart").querySelector("[data-testid=block-info]");
    chart.setAttribute("aria-label", title.textContent.trim());
  }
}).observe(tab, { subtree: true, childList: true, attributeFilter: ["aria-label"] });

const line = (kind, text, name = "") => {
  const made = document.createElement(kind);
  made.textContent = text;
  made.className = name;
  return made;
};

// A tooltip has the piece and its surprisal; figures; and, behind "expected:", the likeliest tokens.
function pin(piece) {
  element.querySelectorAll(".pinned").forEach((old) => old.classList.remove("pinned"));
  piece.classList.add("pinned");
  const panel = element.querySelector(".panel");
  const lines = piece.dataset.tip.split("\n");
  const last = lines.includes("expected:") ? lines.indexOf("expected:") : lines.length;
  const [, token, surprisal] = lines[0].match(/^(“[^]*”)\s*(.*)$/);
  const figures = line("div", "");
  const head = line("strong", "");
  head.append(line("bdi", token), ` ${surprisal}`); // apart, because a token may run from the right
  figures.append(head);
  figures.append(...lines.slice(1, last).map((text) => line("p", text)));
  const before = document.createRange();
  before.setStart(piece.parentElement, 0);
  before.setEndBefore(piece);
  const read = before.toString();
  const context = line("p", "read before it: ");
  context.append(line("bdi", read.length > 90 ? `…${read.slice(-90)}` : read || "nothing", "read"));
  figures.append(context);
  const bars = line("ol", "");
  for (const text of lines.slice(last + 1)) {
    const [, percent, expected] = text.match(/^\s*(\S+%)\s+([^]*)$/);
    const bar = line("li", "", expected === token ? "own" : "");
    bar.append(line("span", percent), line("bdi", expected));
    bar.style.setProperty("--percent", percent);
    bars.append(bar);
  }
  bars.setAttribute("aria-label", "likeliest tokens");
  panel.replaceChildren(figures, ...(bars.childElementCount ? [bars] : []));
}

// At first, the most surprising piece, or that with the largest difference.
function pinFirst() {
  const strength = (piece) => Number(piece.style.getPropertyValue("--s"));
  const pieces = [...element.querySelectorAll(".surprisal b")];
  if (pieces.length) pin(pieces.reduce((most, p) => (strength(p) > strength(most) ? p : most)));
}
watch("value", pinFirst);
pinFirst();

element.addEventListener("click", ({ target }) => pieceAt(target) && pin(pieceAt(target)));
element.addEventListener("focusin", ({ target }) => {
  if (!pieceAt(target)) return;
  target.parentElement.querySelectorAll('[tabindex="0"]').forEach((old) => (old.tabIndex = -1));
  target.tabIndex = 0; // the tab key comes back to it
});
element.addEventListener("keydown", (event) => {
  const piece = pieceAt(event.target);
  if (!piece || event.ctrlKey || event.metaKey) return;
  const all = piece.parentElement;
  const isBackwards = getComputedStyle(piece).direction === "rtl";
  const [left, right] = [piece.previousElementSibling, piece.nextElementSibling];
  const to = {
    ArrowLeft: isBackwards ? right : left,
    ArrowRight: isBackwards ? left : right,
    Home: all.firstElementChild,
    End: all.lastElementChild,
  }[event.key];
  if (event.key === "Enter" || event.key === " ") pin(piece);
  else if (to) to.focus();
  else return;
  event.preventDefault();
});

// Escape closes the tooltip, wherever the focus is, until the mouse or the focus moves. subtle: what
// appears under a mouse at rest gets events too, without a movement.
const quiet = (is) => element.classList.toggle("quiet", is);
document.addEventListener("keydown", ({ key }) => key === "Escape" && quiet(true));
element.addEventListener("focusin", () => quiet(false));
element.addEventListener("mousemove", (event) => {
  if (event.movementX || event.movementY) quiet(false);
});

tab.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    tab.querySelector("button.primary").click();
  }
});

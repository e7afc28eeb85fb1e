// Draws the JSON of a score or of a comparison, and draws again when another one comes.

import { makePairView } from "./pair.js";
import { makeScoreView } from "./score.js";

const VIEWS = { pair: makePairView, score: makeScoreView };

// Gradio's gr.HTML: `element` is its place, `props.value` its value, `watch` tells of another one.
export function start(element, props, watch, kind = "score") {
  helpTab(element.closest("[role=tabpanel]"));
  const view = VIEWS[kind]();
  const draw = () => {
    element.querySelector(".view").replaceChildren(...(props.value ? [view.article] : []));
    if (props.value) view.draw(props.value);
  };
  watch("value", draw);
  draw();
}

// What Gradio lacks on a tab: its result is announced, and Ctrl+Enter presses its main button.
function helpTab(tab) {
  tab.querySelector(".verdict").setAttribute("role", "status");
  tab.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      tab.querySelector("button.primary").click();
    }
  });
}

// Draws the JSON of a score or of a comparison, and draws again when another one comes.

import { makePairView } from "./pair.js";
import { makeScoreView } from "./score.js";

const VIEWS = { pair: makePairView, score: makeScoreView };

// Gradio's gr.HTML: `element` is its place, `props.value` its value, `watch` tells of another one.
export function start(element, props, watch, kind = "score") {
  const tab = element.closest("[role=tabpanel]");
  const announce = () => tab.querySelector(".verdict")?.setAttribute("role", "status");
  pressByKeys(tab);
  const view = VIEWS[kind]();
  const draw = () => {
    announce(); // Gradio may make the verdict after this
    element.querySelector(".view").replaceChildren(...(props.value ? [view.article] : []));
    if (props.value) view.draw(JSON.parse(props.value));
  };
  watch("value", draw);
  draw();
}

// Ctrl+Enter presses the main button of a tab.
function pressByKeys(tab) {
  tab.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      const button = tab.querySelector("button.primary");
      if (event.target.closest(".view")) button.focus(); // the view will be replaced
      button.click();
    }
  });
}

"""How the page looks."""

from gradio import themes

# Four tabs fit on a phone, where Gradio would hide some in a menu.
# Gradio writes a prefix behind each comma, so that no list may stand in `:is()`.
CSS = """
.gradio-container { max-width: none !important; width: 100%; }
.gradio-container main { width: 100%; max-width: 1240px; margin: 0 auto !important; }
@media (max-width: 480px) { .tab-container button { padding: 0 7px !important; } }
/* Of a fixed height, so that nothing jumps when a result comes. */
.score .verdict.block { min-height: 7.5em; }
/* Gradio makes the parts one after the other, the examples late: till then they would move. */
.ask { min-height: 29em; }
@media (max-width: 480px) { .ask { min-height: 31em; } }
.ask:not(:has(.gallery)) > * { visibility: hidden; }
.asking { flex-wrap: nowrap !important; gap: 8px !important; }
@media (max-width: 360px) { .asking { flex-wrap: wrap !important; } }
.asking button { flex: 1 1 0; padding-inline: 8px; white-space: nowrap; }
.asking button.primary { flex-grow: 3; }
.block.link { order: -1; } /* above all: a sentence about a link that cannot be read */
.block.link:has(.notice:empty) { position: absolute; }
.link .notice { margin: 0; }
.link .past { visibility: hidden; } /* its place stays, so that nothing jumps */
.link .said { position: absolute; width: 1px; height: 1px; overflow: hidden; white-space: nowrap;
  clip-path: inset(50%); }
.compared .verdict.block { min-height: 4.5em; }
button[role="tab"][aria-selected="true"] { color: var(--primary-700) !important; }
.dark button[role="tab"][aria-selected="true"] { color: var(--primary-400) !important; }
.or { color: inherit !important; } /* Gradio's "- or -" in the place for a file */
textarea { unicode-bidi: plaintext; text-align: start; } /* each paragraph from its own side */
.verdict p:first-child { font-size: 1.15em; }
input[aria-expanded] { padding-right: 1.6em !important; text-overflow: ellipsis; }
@media (forced-colors: active) {
  button.primary, button.secondary { border: 2px solid !important; }
  button[role="tab"][aria-selected="true"] { text-decoration: underline; }
  input[type="radio"] { forced-color-adjust: none; }
}
/* On paper: the result. */
@media print {
  .ask, .tab-wrapper { display: none !important; }
}
.results :is(td, th) { padding: 5px 8px !important; font-size: 0.9em; }
.results :is(td, th):not(:last-child) { white-space: nowrap; }
.html-container { padding: 0 !important; } /* in line with the text above */
.statistics { border: 0; padding: 0; font-variant-numeric: tabular-nums; }
.statistics tr { border: 0; }
.statistics td, .statistics th { padding: 4px 0 4px clamp(8px, 2vw, 24px); border: 0;
  border-bottom: 1px solid var(--border-color-primary); text-align: right; vertical-align: bottom;
  font-weight: normal; }
.statistics tr:first-child th { min-width: 5.2em; overflow-wrap: anywhere; }
.statistics th:first-child { min-width: 0 !important; padding-left: 0; text-align: left; }
.results code { white-space: normal; overflow-wrap: anywhere; }
"""


def theme(name: str) -> themes.Base:
    """One of Gradio's own, with fonts and colours that all can read."""
    # Gradio's bold fonts lack many letters, which the system's fonts have. Gradio's hints and main
    # button have too little contrast (WCAG 2.2 asks for 4.5).
    return getattr(themes, name.capitalize())(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )

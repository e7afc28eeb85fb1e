"""The page: its tabs, and which handler each button calls."""

import os

import gradio as gr
from gradio.components import Component
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse

from demo.asking import UNSEEN, Asking, Links
from demo.handlers import make_handlers, refused
from demo.queueing import bound_queue
from demo.score_view import pair_view, score_view
from demo.service import Metrics
from demo.settings import Example, Settings

CONVERSATION_HINT = """User: …
Assistant: …

or JSON: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]"""
# Gradio's queue would keep who asked for what, 10,000 requests back, and count them after each.
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"


class Page(gr.Blocks):
    """Gradio's page, which keeps nothing of a visitor and takes nothing that they cannot send."""

    async def process_api(self, *args, **kwargs):
        """Answer a call, and forget it: Gradio would keep its texts and results for the session."""
        return await super().process_api(*args, **{**kwargs, "state": SessionState(self)})

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """What a call sent -> what its handler gets. The last fields may be left out.

        Raises:
            gr.Error: a text is something else, or a file was not uploaded. Gradio would write the
                one down as a text, and fetch the other from any address, whichever field it is in.
        """
        traverse(inputs, _refuse_from_elsewhere, is_file_obj_with_meta)
        for field, value in zip(block_fn.inputs, inputs, strict=False):
            if isinstance(field, gr.Textbox) and not isinstance(value, str | None):
                kind = type(value).__name__
                raise refused(f"{field.label} must be a text, a string in JSON, got {kind}.")
        # Gradio's client does the same; other programs send what they know of.
        inputs = [*inputs, *(field.value for field in block_fn.inputs[len(inputs) :])]
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _refuse_from_elsewhere(file: dict) -> None:
    path = file["path"]
    if is_http_url_like(path) or not is_in_or_equal(path, get_upload_folder()):
        raise refused("The file was not uploaded. Upload the file here.")


def make_page(settings: Settings, metrics: Metrics) -> Page:
    """The page."""
    handlers = make_handlers(settings, metrics)
    described = [(f"{model.label}: {model.description}", model.label) for model in settings.models]
    limits = settings.limits
    # Besides the visitors who score, one for each model may wait for it to be loaded.
    at_once = settings.queue.concurrency + len(settings.models)
    of_model = {"concurrency_id": "model", "concurrency_limit": at_once}
    choices: list[gr.Dropdown] = []

    def text_box(label: str, **more) -> gr.Textbox:
        # Of a fixed height, so that nothing below it jumps.
        return gr.Textbox(label=label, lines=7, max_lines=7, **more)

    def model_choice(label: str) -> gr.Dropdown:
        choices.append(gr.Dropdown(described, value=settings.default_model, label=label))
        return choices[-1]

    def usable() -> list[gr.Dropdown]:
        """The lists without the models that cannot be used; Gradio can disable no single one."""
        absent = metrics.models.absent()
        found = [(name, label) for name, label in described if label not in absent]
        hint = f"Not available at the moment: {', '.join(absent)}." if absent else ""
        return [gr.Dropdown(found, info=hint) for _ in choices]

    def examples_of(examples: list[Example], box: gr.Textbox) -> None:
        gr.Examples(
            [[example.text] for example in examples],
            [box],
            example_labels=[example.label for example in examples],
            api_visibility="private",
        )

    def score_outputs() -> list[Component]:
        with gr.Column(scale=3, min_width=300, elem_classes="score"):
            return [gr.Markdown(elem_classes="verdict"), score_view()]

    # Uploads are deleted after an hour at the latest, and nothing else that a visitor sends is
    # written to disk. Memory keeps a text or a result until it is fetched, and only the latest
    # `queue.size` of those that nobody fetches.
    with Page(title=settings.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {settings.title}\n\n{settings.intro}")
        with gr.Tab("Text", elem_id="text"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300, elem_classes="ask"):
                    text = text_box("Text", value=settings.examples[0].text)
                    examples_of(settings.examples, text)
                    model = model_choice("Model")
                    ask_text = Asking("text", "Score", text=text, model=model)
                opening_outputs = outputs = score_outputs()
            inputs, more = [text, model], {"show_progress_on": outputs[1], **of_model}
            ask_text.connect(page, handlers["score"], inputs, outputs, api_name="score", **more)
        with gr.Tab("Conversation", elem_id="conversation"):
            gr.Markdown(
                "How surprised is the model by what the assistant says? All else is grey: it only "
                "conditions what follows. A model without a chat template of its own, such as the "
                "bundled one or GPT-2, was not trained on conversations and reads plain lines."
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=300, elem_classes="ask"):
                    conversation = text_box("Conversation", placeholder=CONVERSATION_HINT)
                    examples_of(settings.conversation_examples, conversation)
                    model = model_choice("Model")
                    ask_conversation = Asking(
                        "conversation", "Score", conversation=conversation, model=model
                    )
                outputs = score_outputs()
            inputs, more = [conversation, model], {"show_progress_on": outputs[1], **of_model}
            handler = handlers["conversation"]
            ask_conversation.connect(
                page, handler, inputs, outputs, api_name="conversation", **more
            )
        with gr.Tab("Compare", elem_id="compare"):
            gr.Markdown(
                "Two texts under one model; or one text under two models, with the second text "
                "left empty. Where both sides have the same text, its colour shows by how much "
                "less or more it surprises this side than the other."
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    text_a, model_a = text_box("Text A"), model_choice("Model A")
                with gr.Column(min_width=300):
                    text_b = text_box("Text B", placeholder="Empty: the same as text A")
                    model_b = model_choice("Model B")
            fields = {"text_a": text_a, "model_a": model_a, "text_b": text_b, "model_b": model_b}
            ask_compare = Asking("compare", "Compare", **fields)
            with gr.Column(elem_classes=["score", "compared"]):
                line, picture, table = gr.Markdown(elem_classes="verdict"), pair_view(), gr.HTML()
            inputs, outputs = [text_a, model_a, text_b, model_b], [line, table, picture]
            more = {"show_progress_on": picture, **of_model}
            ask_compare.connect(
                page, handlers["compare"], inputs, outputs, api_name="compare", **more
            )
        with gr.Tab("Logits", elem_id="logits"):
            gr.Markdown(
                "An .npz or .safetensors file with `logits` (B, T, V), `labels` (B, T) and, if you "
                f"like, `sample_weight` (B, T) or (B,); at most {limits.file_mb} MB."
            )
            file = gr.File(label="File", file_types=[".npz", ".safetensors"], height=140)
            make_example = gr.Button("Make a small example file")
            with gr.Row():
                from_logits = gr.Checkbox(
                    True, label="from_logits", info="off: probabilities", min_width=200
                )
                shift = gr.Checkbox(
                    False, label="shift", info="on: labels are the input ids", min_width=200
                )
            with gr.Row():
                ignore_index = gr.Textbox(
                    "-100", label="ignore_index", info="ids, with commas; or empty", min_width=200
                )
                mask_token_id = gr.Textbox(
                    "", label="mask_token_id", info="one more id; or empty", min_width=200
                )
            button = gr.Button("Compute", variant="primary")
            table = gr.Markdown(elem_classes="results")
            with gr.Accordion("All figures", open=False):
                result = gr.JSON(label="Result")
            make_example.click(handlers["example"], None, file, api_name="example")
            inputs = [file, from_logits, ignore_index, mask_token_id, shift]
            outputs = [table, result]
            more = {"show_progress_on": table, "concurrency_limit": 1}
            # The old result goes first: it would stay after an error.
            button.click(
                None, None, outputs, js="() => [null, null]", api_visibility="private"
            ).then(handlers["logits"], inputs, outputs, api_name="logits", **more)
        # Behind the tabs, whose parts Gradio then makes first; shown above them.
        links = Links(settings)
        links.keep_tab("logits", button)
        links.connect([ask_text, ask_conversation, ask_compare], handlers["first"], opening_outputs)
        page.load(usable, None, choices, **UNSEEN)
    # Closed: a way to the handlers that goes around the queue.
    page.queue(max_size=settings.queue.size, api_open=False)
    bound_queue(page._queue, settings.queue)
    return page

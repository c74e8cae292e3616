"""The page: what to make on the left, what to do with it in tabs on the right.

Gradio has the inputs, the buttons and the API; what it has no part for (forms of methods, runs as
they go, the player, the gallery) are elements of static/*.js, which read the addresses of
`routes.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio.components import Component

from vdit_sparse.app.demo.api import add_api
from vdit_sparse.app.demo.desk import EXAMPLES, Desk
from vdit_sparse.app.demo.models import BUNDLED_NAME
from vdit_sparse.app.demo.routes import owner_in
from vdit_sparse.app.demo.worker import in_words
from vdit_sparse.app.options import InputError

TITLE = "vdit-sparse studio"
AUTO = "auto"
DTYPES = (AUTO, "bf16", "fp16", "fp32")
# Parts of a model's own height and width that are offered.
SCALES = (1.0, 0.75, 0.5)
# Entries of a form, in the order of the inputs.
ENTRIES = (
    *("prompt", "model", "size", "num_frames", "steps", "seed", "dtype", "negative_prompt"),
    *("guidance_scale", "calibration", "image", "runs"),
)
# The last input is what the page's own elements say.
RUNS = "(...given) => { given[given.length - 1] = studio.runs('%s'); return given; }"
ANSWERED = "(answer) => studio.answer('%s', answer)"
FAILED = "() => studio.answer('%s', '')"
METHODS = '<studio-methods kind="{}" most="{}"></studio-methods>'
NO_COOKIE = "This browser sends no cookies. Allow them here: they say which runs are yours."
# The page's own events: answered at once, whatever waits in Gradio's queue.
QUIET = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def build_page(desk: Desk) -> gr.Blocks:
    """The page of a desk."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)
    ) as page:
        _element("<studio-header></studio-header>", elem_id="header")
        with gr.Row(elem_id="studio"):
            with gr.Column(elem_id="what", scale=2, min_width=300):
                inputs = _what(desk, page)
            with gr.Column(elem_id="how", scale=5, min_width=300), gr.Tabs(elem_id="tabs"):
                most = desk.studio.limits.compared
                with gr.Tab("Generate", id="generate"):
                    _tab(desk, "generate", "Generate", inputs, METHODS.format("generate", 1))
                with gr.Tab("Compare", id="compare"):
                    _tab(desk, "compare", "Compare", inputs, METHODS.format("compare", most))
                with gr.Tab("Look inside", id="inspect"):
                    own = METHODS.format("inspect", 1)
                    _tab(desk, "inspect", "Look inside", inputs, own)
                with gr.Tab("Bench", id="bench"):
                    own = '<studio-bench-form kind="bench"></studio-bench-form>'
                    _tab(desk, "bench", "Measure", [], own)
        add_api(desk)
        _element("<studio-gallery></studio-gallery>", elem_id="gallery")
    return page


def _element(html: str, **options) -> gr.HTML:
    """A part of ours, without Gradio's styles for prose."""
    return gr.HTML(html, apply_default_css=False, **options)


def _what(desk: Desk, page: gr.Blocks) -> list[Component]:
    """The inputs that all runs share, in the order of `ENTRIES`."""
    limits = desk.studio.limits
    prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=3, max_lines=8, elem_id="prompt")
    _element("<studio-examples></studio-examples>")
    model = gr.Dropdown(
        [BUNDLED_NAME], value=BUNDLED_NAME, label="Model", elem_id="model", allow_custom_value=True
    )
    size = gr.Dropdown([], label="Size", elem_id="size", allow_custom_value=True)
    frames = gr.Slider(1, limits.frames, step=1, label="Frames", elem_id="frames")
    steps = gr.Slider(1, limits.steps, step=1, label="Steps", elem_id="steps")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=90)
        dtype = gr.Dropdown(DTYPES, value=AUTO, label="Precision", elem_id="dtype", min_width=90)
    with gr.Accordion("More", open=False, elem_id="more"):
        negative = gr.Textbox(label="Negative prompt", elem_id="negative")
        guidance = gr.Slider(0, 12, step=0.5, label="Guidance", elem_id="guidance")
        calibration = _upload("Calibration", ".safetensors", desk.upload_calibration)
        image = _upload("First frame", "image", desk.upload_image)
    about = _about(desk)
    outputs = [size, frames, steps, guidance]
    page.load(lambda: gr.update(choices=desk.forms()["models"]), None, model, **QUIET)
    for event in (page.load, model.change):
        event(about, [model], outputs, **QUIET)
        event(None, [model], None, js="(model) => studio.model(model)")
    return [prompt, model, size, frames, steps, seed, dtype, negative, guidance, calibration, image]


def _upload(label: str, kind: str, keep: Callable[[str, Path], tuple[str, str]]) -> Component:
    """A place for a file, and a hidden input with the name that it is kept under."""
    place = gr.File(label=label, file_types=[kind], height=110, elem_id=label.split()[0].lower())
    said = gr.Markdown("", elem_classes="said")
    name = gr.Textbox(visible="hidden")

    def sent(file: str | None, request: gr.Request):
        if file is None:
            return "", ""
        try:
            return keep(owner_of_page(request), Path(file))
        except InputError as error:
            return "", f"<span class='st-error'>{in_words(error)}</span>"

    place.change(sent, [place], [name, said], **QUIET)
    return name


def _about(desk: Desk) -> Callable:
    """Model -> what size, frames, steps and guidance are for it."""
    limits = desk.studio.limits

    def about(model: str) -> tuple:
        try:
            found = desk.about(model or "")
        except InputError:
            return (gr.update(),) * 4
        own, unit = found["defaults"], found["geometry"] or (16, 16, 4)
        sizes = sizes_of(own, unit)
        frames = min(own.get("num_frames") or 1, limits.frames)
        most = 1 + (limits.frames - 1) // unit[2] * unit[2]
        return (
            gr.update(choices=sizes, value=sizes[0] if sizes else None),
            gr.update(value=frames, step=unit[2], maximum=most, visible=not found["images"]),
            gr.update(value=min(own.get("num_inference_steps") or 50, limits.steps)),
            gr.update(value=own.get("guidance_scale") or 0),
        )

    return about


def sizes_of(defaults: dict, unit: tuple[int, int, int]) -> list[str]:
    """Sizes to choose from: the model's own, smaller ones of its shape, upright, and square."""
    height, width = defaults.get("height"), defaults.get("width")
    if not height or not width:
        return []
    shapes = [(height * scale, width * scale) for scale in SCALES]
    shapes += [(width, height), (min(height, width),) * 2]
    sizes = [
        tuple(max(1, round(x / u)) * u for x, u in zip(shape, unit, strict=False))
        for shape in shapes
    ]
    return list(dict.fromkeys(f"{h}x{w}" for h, w in sizes))


def _tab(desk: Desk, kind: str, title: str, inputs: list[Component], own: str) -> None:
    """A tab: `own` is the element that says what to run, beside the inputs that all share."""
    _element(own)
    start = gr.Button(title, variant="primary", elem_id=f"start-{kind}", elem_classes="start")
    runs, answer = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    _element(f'<studio-stage kind="{kind}"></studio-stage>')

    def submit(request: gr.Request, *values) -> str:
        form = form_of(values) if inputs else json.loads(values[0])
        try:
            job = desk.submit(owner_of_page(request), kind, form)
        except InputError as error:
            return json.dumps({"error": in_words(error)})
        return json.dumps({"name": job.name})

    sent = start.click(submit, [*inputs, runs], [answer], js=RUNS % kind, **QUIET)
    sent.success(None, [answer], None, js=ANSWERED % kind)
    sent.failure(None, None, None, js=FAILED % kind)


def form_of(values: tuple) -> dict:
    """The form that `ask.read` takes, from the values of the inputs."""
    form = dict(zip(ENTRIES, values, strict=True))
    # The page's own elements give texts, and what else their tab asks for.
    form |= json.loads(form["runs"])
    form["dtype"] = None if form["dtype"] == AUTO else form["dtype"]
    for name in ("num_frames", "steps", "seed"):
        form[name] = None if form[name] is None else int(form[name])
    return form


def owner_of_page(request: gr.Request) -> str:
    """The key of the user whose page asks. Raises InputError for a browser without cookies."""
    owner = owner_in(request)
    if owner is None:
        raise InputError(NO_COOKIE)
    return owner

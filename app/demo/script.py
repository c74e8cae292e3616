"""The Python script that repeats a request with the functions that the README shows."""

import dataclasses

from vdit_sparse.app.demo.ask import CALIBRATION, IMAGE
from vdit_sparse.app.options import RunChoice
from vdit_sparse.app.request import Request

HEAD = '''"""Made by the studio of vdit-sparse: the same {what} from the same noise."""

import torch
{imports}

import vdit_sparse
from vdit_sparse.eval.metrics import psnr

PROMPT = {prompt!r}
CALL = {call!r}{image}

# None is dense attention, as diffusers has it.
RUNS = {{
{runs}
}}

pipe = vdit_sparse.load_pipeline({load})
frames = {{}}
for name, method in RUNS.items():
    if method is None:
        vdit_sparse.remove(pipe)
    else:
        pipe.set_attn_processor(method)
    generator = torch.Generator("cpu").manual_seed({seed})
    {made}
    frames[name] = (video * 255).round().to(torch.uint8)  # [T, 3, H, W]
    {saved}
    print(name, "" if method is None else f"density {{vdit_sparse.summary(pipe).density:.3f}}")
    if "dense" in frames and name != "dense":
        print(f"  PSNR against dense {{float(psnr(frames[name], frames['dense'])):.2f}} dB")
'''


# What the pipeline returns, and the file that is made of it.
OF_VIDEOS = (
    'video = pipe(PROMPT, generator=generator, output_type="pt", **CALL).frames[0].cpu().float()'
)
OF_IMAGES = """\
out = pipe(PROMPT, generator=generator, output_type="pt", return_dict=False, **CALL)
    video = out[0][:1].cpu().float()  # one frame"""
MP4 = 'export_to_video(list(video.permute(0, 2, 3, 1).numpy()), f"{{name}}.mp4", fps={fps})'
PNG = 'Image.fromarray(frames[name][0].permute(1, 2, 0).numpy()).save(f"{name}.png")'


def script(
    request: Request, names: list[str], model: str | None, fps: float | None, images: bool = False
) -> str:
    """The script of a request whose runs are called `names`, dense first; `model` as the user named
    it, None for the bundled one.

    fps: None where each run is one frame, a PNG; images: whether the model makes images.
    """
    runs = sorted(request.runs, key=lambda choice: choice.method is not None)
    lines = (f"    {name!r}: {_method(choice)}," for name, choice in zip(names, runs, strict=True))
    height, width = request.size or (None, None)
    call = {
        "negative_prompt": request.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": None if images else request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    load = [] if model is None else [repr(model)]
    if request.dtype:
        load.append(f"dtype=torch.{_DTYPES.get(request.dtype, request.dtype)}")
    if request.image is not None:
        load.append("image_to_video=True")
    return HEAD.format(
        what="videos" if fps else "images",
        imports=_imports(fps is not None, request.image is not None),
        made=OF_IMAGES if images else OF_VIDEOS,
        saved=MP4.format(fps=fps) if fps else PNG,
        prompt=request.prompt,
        call={name: value for name, value in call.items() if value is not None},
        image="" if request.image is None else f'\nCALL["image"] = load_image("{IMAGE}")',
        runs="\n".join(lines),
        load=", ".join(load),
        seed=request.seed,
    )


def _imports(videos: bool, image: bool) -> str:
    names = ["export_to_video"] * videos + ["load_image"] * image
    lines = [f"from diffusers.utils import {', '.join(names)}"] * bool(names)
    return "\n".join([*lines, *["from PIL import Image"] * (not videos)])


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _method(choice: RunChoice) -> str:
    if choice.method is None:
        return "None"
    changed = {
        field.name: getattr(choice.method, field.name)
        for field in dataclasses.fields(choice.method)
        if getattr(choice.method, field.name) != field.default
    }
    if changed.get("calibration"):
        changed["calibration"] = CALIBRATION
    fields = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f"vdit_sparse.{type(choice.method).__name__}({fields})"

"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import (
    cogvideox,
    cosmos,
    flux,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    mochi,
    qwen_image,
    skyreels_v2,
    wan,
    wan_vace,
)

TINY = {
    **cogvideox.TINY,
    **cosmos.TINY,
    **flux.TINY,
    **hunyuan_video.TINY,
    **hunyuan_video15.TINY,
    **kandinsky5.TINY,
    **mochi.TINY,
    **qwen_image.TINY,
    **skyreels_v2.TINY,
    **wan.TINY,
    **wan_vace.TINY,
}

# Those whose layers are another entry's, fed otherwise: they run one method, and are not saved.
VARIANTS = {
    "cogvideox-1.5",
    "flux-guided",
    "flux-fill",
    "hunyuan-video-guided",
    "hunyuan-video-latent-concat",
    "wan-ti2v",
}

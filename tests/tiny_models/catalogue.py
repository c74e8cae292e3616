"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import (
    allegro,
    chroma,
    cogvideox,
    cosmos,
    flux,
    flux2,
    hidream,
    hunyuan_dit,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx2,
    ltx_video,
    mochi,
    pixart,
    qwen_image,
    skyreels_v2,
    stable_diffusion_3,
    wan,
    wan_vace,
    z_image,
)

TINY = {
    **allegro.TINY,
    **chroma.TINY,
    **cogvideox.TINY,
    **cosmos.TINY,
    **flux.TINY,
    **flux2.TINY,
    **hidream.TINY,
    **hunyuan_dit.TINY,
    **hunyuan_video.TINY,
    **hunyuan_video15.TINY,
    **kandinsky5.TINY,
    **ltx2.TINY,
    **ltx_video.TINY,
    **mochi.TINY,
    **pixart.TINY,
    **qwen_image.TINY,
    **skyreels_v2.TINY,
    **stable_diffusion_3.TINY,
    **wan.TINY,
    **wan_vace.TINY,
    **z_image.TINY,
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

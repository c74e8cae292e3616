"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import cogvideox, flux, hunyuan_video, mochi, wan

TINY = {
    **cogvideox.TINY,
    **flux.TINY,
    **hunyuan_video.TINY,
    **mochi.TINY,
    **wan.TINY,
}

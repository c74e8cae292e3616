"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import (
    cogvideox,
    flux,
    hunyuan_video,
    hunyuan_video15,
    mochi,
    wan,
)

TINY = {
    **cogvideox.TINY,
    **flux.TINY,
    **hunyuan_video.TINY,
    **hunyuan_video15.TINY,
    **mochi.TINY,
    **wan.TINY,
}

"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import hunyuan_video, wan

TINY = {
    **hunyuan_video.TINY,
    **wan.TINY,
}

"""All tiny pipelines by name, each a function that builds one."""

from tests.tiny_models import wan

TINY = {
    **wan.TINY,
}

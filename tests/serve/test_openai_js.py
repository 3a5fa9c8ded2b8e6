"""The official `openai` package for JavaScript, unmodified; see js/openai.test.js."""

from tests.conftest import needs_node
from tests.serve.conftest import Guarded
from tests.serve.javascript import passed


@needs_node
def test_the_javascript_client_works(guarded: Guarded) -> None:
    guarded.use_up_other_key()
    passed("openai.test.js", 10, BASE_URL=guarded.url, KEY=guarded.key, SPENT_KEY=guarded.other_key)

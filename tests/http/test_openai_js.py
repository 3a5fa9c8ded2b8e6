"""The official `openai` package for JavaScript, unmodified; see js/openai.test.js."""

from tests.conftest import needs_node
from tests.http.conftest import Endpoint, use_up_other_key
from tests.http.javascript import passed


@needs_node
def test_the_javascript_client_works(guarded: Endpoint) -> None:
    use_up_other_key(guarded)
    passed("openai.test.js", 10, BASE_URL=guarded.url, KEY=guarded.key, SPENT_KEY=guarded.other_key)

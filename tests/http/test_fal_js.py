"""The official `@fal-ai/client` for JavaScript, unmodified; see js/fal.test.js."""

import json
import re

from tests.conftest import needs_node
from tests.http.conftest import Endpoint
from tests.http.javascript import passed
from tests.polling import until


@needs_node
def test_the_javascript_client_works(vendors: Endpoint) -> None:
    receiver = vendors.receiver
    environment = vendors.trust | {"BASE_URL": vendors.url, "KEY": vendors.key, "HOOK": receiver.url}
    match = re.search("told of ([0-9a-f-]{36})", passed("fal.test.js", 15, **environment))
    assert match
    request_id = match[1].encode()
    until(lambda: any(request_id in body for _, body in receiver.came))
    message = next(json.loads(body) for _, body in receiver.came if request_id in body)
    assert (message["status"], message["payload"]["seed"]) == ("OK", 5)

// The official `openai` package, unmodified, against the server at BASE_URL, whose key is KEY. Run by node --test.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { toFile } from "openai";

const { BASE_URL, KEY, SPENT_KEY } = process.env;
const clientOf = (apiKey) => new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey, maxRetries: 0 });
const client = clientOf(KEY);
const small = { prompt: "a boat", size: "512x512", num_inference_steps: 2, seed: 5 };

const isPNG = (base64) => Buffer.from(base64, "base64").subarray(1, 4).toString() === "PNG";

test("generates", async () => {
  const answer = await client.images.generate({ ...small, n: 2 });
  assert.deepEqual(answer.data.map((image) => image.seed), [5, 6]);
  assert.ok(answer._request_id);
  assert.ok(answer.usage.total_tokens > 0);
  const file = await fetch(answer.data[0].url);
  assert.equal(file.headers.get("content-type"), "image/png");
});

test("edits one image, and several", async () => {
  const { data } = await client.images.generate({ ...small, response_format: "b64_json" });
  const source = Buffer.from(data[0].b64_json, "base64");
  for (const image of [await toFile(source, "a.png"), [await toFile(source), await toFile(source)]]) {
    const edited = await client.images.edit({ ...small, image, response_format: "b64_json" });
    assert.ok(isPNG(edited.data[0].b64_json));
  }
});

test("streams previews and the image", async () => {
  const kinds = [];
  for await (const event of await client.images.generate({ ...small, stream: true, partial_images: 1 })) {
    kinds.push(event.type);
    assert.ok(isPNG(event.b64_json));
  }
  assert.deepEqual(kinds, ["image_generation.partial_image", "image_generation.completed"]);
});

test("lists models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["guarded", "broken"]);
});

const failures = [
  [400, OpenAI.BadRequestError, { ...small, n: 11 }, KEY],
  [401, OpenAI.AuthenticationError, small, "wrong"],
  [404, OpenAI.NotFoundError, { ...small, model: "dall-e-9" }, KEY],
  [413, OpenAI.APIError, { ...small, user: "x".repeat(2 ** 20) }, KEY],
  [429, OpenAI.RateLimitError, { ...small, num_inference_steps: 100 }, SPENT_KEY],
  [500, OpenAI.InternalServerError, { ...small, model: "broken" }, KEY],
];

for (const [status, kind, body, key] of failures) {
  test(`throws what belongs to ${status}`, async () => {
    await assert.rejects(clientOf(key).images.generate(body), (error) => {
      assert.ok(error instanceof kind, `${error}`);
      assert.equal(error.status, status);
      assert.ok(error.requestID);
      return true;
    });
  });
}

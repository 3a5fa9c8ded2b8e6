// The official `@fal-ai/client`, unmodified, against the server at BASE_URL, whose key is KEY. Run by node --test.
// Either way that it has to another host than fal's: rewritten addresses, and a proxy's.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createFalClient } from "@fal-ai/client";

const { BASE_URL, KEY, HOOK } = process.env;
const APP = "fal-ai/glm-image";
const small = { prompt: "a boat", image_size: "square", num_inference_steps: 10, seed: 5 };
const long = { ...small, num_inference_steps: 100, image_size: { width: 2048, height: 2048 }, num_images: 4 };
const LOG = ["began", "image 0: prior stage", "image 0: decoder stage", "succeeded"];

const rewritten = (request) => ({
  ...request,
  url: request.url
    .replace("https://queue.fal.run", `${BASE_URL}/queue`)
    .replace(/https:\/\/(fal\.run|rest\.fal\.ai)/, BASE_URL),
});
const ways = {
  "rewritten addresses": { requestMiddleware: async (request) => rewritten(request) },
  "the proxy": { proxyUrl: { url: `${BASE_URL}/api/fal/proxy`, when: "always" } },
};
const sent = [];
const counted = (url, options) => {
  sent.push(`${options.method} ${url}`);
  return fetch(url, options);
};
const clientBy = (way, credentials = KEY) => createFalClient({ ...way, credentials, fetch: counted });
const client = clientBy(ways["rewritten addresses"]);

const thrown = async (promise) => {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  return assert.fail("nothing was thrown");
};
const until = async (condition) => {
  const deadline = Date.now() + 60_000;
  while (!(await condition())) assert.ok(Date.now() < deadline, "waited in vain");
};

for (const [name, way] of Object.entries(ways)) {
  const fal = clientBy(way);

  test(`runs by ${name}`, async () => {
    const { data, requestId } = await fal.run(APP, { input: small });
    assert.ok(requestId);
    assert.deepEqual([data.seed, data.prompt, data.has_nsfw_concepts], [5, "a boat", [false]]);
    assert.equal((await fetch(data.images[0].url)).headers.get("content-type"), "image/jpeg");
  });

  for (const mode of ["polling", "streaming"]) {
    test(`subscribes by ${mode} and ${name}`, async () => {
      const updates = [];
      const enqueued = [];
      const { data, requestId } = await fal.subscribe(APP, {
        input: { ...small, num_inference_steps: 50 }, // long enough to be seen in progress
        mode,
        logs: true,
        pollInterval: 100,
        onEnqueue: (id) => enqueued.push(id),
        onQueueUpdate: (update) => updates.push(structuredClone(update)),
      });
      assert.equal(data.seed, 5);
      assert.deepEqual(enqueued, [requestId]);
      const last = updates.at(-1);
      assert.equal(last.status, "COMPLETED");
      assert.deepEqual(last.logs.map((log) => log.message), LOG);
      assert.ok(updates.some((update) => update.status === "IN_PROGRESS"));
      assert.ok(last.metrics.inference_time > 0);
    });
  }

  test(`edits a Blob, which it uploads by ${name}`, async () => {
    const input = { ...small, sync_mode: true, output_format: "png" };
    const { data } = await fal.run(APP, { input });
    const blob = await (await fetch(data.images[0].url)).blob();
    sent.length = 0;
    const edited = await fal.run(`${APP}/image-to-image`, { input: { ...small, image_urls: [blob] } });
    assert.equal(edited.data.images[0].width, 512);
    assert.deepEqual(sent.map((request) => request.split(" ")[0]), ["POST", "PUT", "POST"]);
    const url = await fal.storage.upload(blob, { lifecycle: { expiresIn: "1h" } });
    const [, address] = sent.at(-1).split(" ");
    assert.equal((await fetch(address, { method: "PUT", body: blob })).status, 409, "it is taken once");
    assert.deepEqual(await (await fetch(url)).arrayBuffer(), await blob.arrayBuffer());
  });
}

test("queues, is told how it gets on, and fetches", async () => {
  const { request_id: requestId, status } = await client.queue.submit(APP, { input: small });
  assert.equal(status, "IN_QUEUE");
  const lines = [];
  const updates = await client.queue.streamStatus(APP, { requestId, logs: true });
  for await (const { logs } of updates) lines.push(...(logs ?? []).map((log) => log.message));
  assert.deepEqual(lines, LOG, "each line is sent once");
  assert.equal((await updates.done()).status, "COMPLETED");
  const asked = await client.queue.status(APP, { requestId, logs: true });
  assert.deepEqual([asked.status, asked.logs.map((log) => log.message)], ["COMPLETED", LOG]);
  assert.deepEqual((await client.queue.status(APP, { requestId })).logs, []);
  const result = await client.queue.result(APP, { requestId });
  assert.deepEqual([result.requestId, result.data.seed], [requestId, 5]);
});

test("cancels", async () => {
  const { request_id: requestId } = await client.queue.submit(APP, { input: long });
  const status = () => client.queue.status(APP, { requestId });
  await client.queue.cancel(APP, { requestId });
  await until(async () => (await status()).status === "COMPLETED");
  assert.equal((await status()).error_type, "client_cancelled");
  const error = await thrown(client.queue.result(APP, { requestId }));
  assert.deepEqual([error.name, error.status], ["ApiError", 499]);
  assert.equal((await thrown(client.queue.cancel(APP, { requestId }))).status, 400);
});

test("gives up in time, and is cancelled", async () => {
  const ids = [];
  const options = { input: long, timeout: 1500, onEnqueue: (id) => ids.push(id) };
  await assert.rejects(client.subscribe(APP, options), /timed out/);
  const status = () => client.queue.status(APP, { requestId: ids[0] });
  await until(async () => (await status()).status === "COMPLETED");
  assert.equal((await status()).error_type, "client_cancelled");
});

test("is told by a webhook, and waits behind others by its priority", async () => {
  const busy = await Promise.all(Array.from({ length: 5 }, () => client.queue.submit(APP, { input: long })));
  const low = await client.queue.submit(APP, { input: small, priority: "low", webhookUrl: HOOK });
  const normal = await client.queue.submit(APP, { input: small });
  assert.equal(low.status, "IN_QUEUE");
  assert.ok(low.queue_position >= normal.queue_position);
  const late = await client.queue.submit(APP, { input: small, startTimeout: 1.5 });
  const lateStatus = () => client.queue.status(APP, { requestId: late.request_id });
  await until(async () => (await lateStatus()).status === "COMPLETED");
  const tooLate = await thrown(client.queue.result(APP, { requestId: late.request_id }));
  assert.deepEqual([tooLate.status, tooLate.isUserTimeout], [504, true]);
  for (const { request_id: requestId } of busy) await client.queue.cancel(APP, { requestId });
  await client.queue.cancel(APP, { requestId: normal.request_id });
  await client.queue.subscribeToStatus(APP, { requestId: low.request_id });
  assert.equal((await client.queue.result(APP, { requestId: low.request_id })).data.seed, 5);
  console.log(`told of ${low.request_id}`);
});

test("bad input has its fields named, and is sent once", async () => {
  for (const [field, wrong] of Object.entries({
    num_images: 5,
    image_size: "huge",
    guidance_scale: "high",
    enable_prompt_expansion: true,
    prompt: " ",
    unheard_of: 1,
  })) {
    sent.length = 0;
    const error = await thrown(client.run(APP, { input: { ...small, [field]: wrong } }));
    assert.deepEqual([error.name, error.status], ["ValidationError", 422]);
    assert.equal(error.getFieldErrors(field).length, 1, field);
    assert.ok(error.requestId);
    assert.equal(sent.length, 1);
  }
});

test("other errors have their statuses", async () => {
  const strangers = clientBy(ways["the proxy"], "wrong");
  const refused = await thrown(strangers.run(APP, { input: small }));
  assert.deepEqual([refused.name, refused.status], ["ApiError", 401]);
  const unknown = await thrown(client.run("fal-ai/nothing", { input: small }));
  assert.deepEqual([unknown.name, unknown.status], ["ApiError", 404]);
  sent.length = 0;
  const error = await thrown(client.run("fal-ai/broken", { input: small }));
  assert.deepEqual([error.status, error.body.error_type], [500, "internal_error"]);
  assert.equal(sent.length, 1);
});

test("the proxy leads to no other host", async () => {
  const headers = { Authorization: `Key ${KEY}`, "x-fal-target-url": "https://example.com/x" };
  const answer = await fetch(`${BASE_URL}/api/fal/proxy`, { method: "POST", headers, body: "{}" });
  assert.equal(answer.status, 412);
  const { detail, error_type: kind } = await answer.json();
  assert.match(detail, /x-fal-target-url/);
  assert.equal(kind, "precondition_failed");
});

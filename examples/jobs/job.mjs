// Submits a job, follows it through lost connections, and saves its image as star.png.
// Needs Node 20 or newer.
import { writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
const jobs = `${SERVER}/v1/images/jobs`;
const headers = { Authorization: `Bearer ${KEY}` };

// Repeats a request until there is an answer. Throws if the server refuses it.
async function send(url, options) {
  for (;;) {
    const answer = await fetch(url, options).catch((error) => console.log(`no answer: ${error.message}`));
    if (answer?.ok) return answer;
    if (answer && answer.status < 500 && answer.status !== 429) throw new Error(await answer.text());
    await sleep(1000);
  }
}

async function* events(body) {
  let text = "";
  for await (const chunk of body.pipeThrough(new TextDecoderStream())) {
    const blocks = (text + chunk).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) yield Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/, 2)));
  }
}

// The server gives all requests with one Idempotency-Key the same job, so the request may be repeated.
const prompt = "a small red star above a blue circle on a yellow background";
const submitted = await send(jobs, {
  method: "POST",
  headers: { ...headers, "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID() },
  body: JSON.stringify({ prompt, size: "512x512", seed: 7 }),
});
let job = await submitted.json();
for (let seen = ""; ; await sleep(1000)) {
  const { body } = await send(`${jobs}/${job.id}/events`, { headers: { ...headers, "Last-Event-ID": seen } });
  try {
    for await (const { id, event, data } of events(body)) {
      seen = id ?? seen;
      if (!data || event === "error") continue;
      job = JSON.parse(data);
      console.log(`${job.status} ${Math.round(job.progress * 100)} %`);
    }
  } catch (error) {
    console.log(`connection lost: ${error.message}`);
  }
  if (!["queued", "running"].includes(job.status)) break;
}
if (job.status !== "succeeded") throw new Error(`${job.status}: ${job.error?.message}`);
const file = await fetch(job.result.data[0].url);
await writeFile("star.png", Buffer.from(await file.arrayBuffer()));
console.log("star.png");

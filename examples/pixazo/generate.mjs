// Submits a request by Pixazo's API, polls it, and saves the image as star.jpeg.
// Needs Node 20 or newer.
import { writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;

async function send(url, options) {
  const headers = { "Ocp-Apim-Subscription-Key": KEY, "Content-Type": "application/json" };
  const answer = await fetch(url, { headers, ...options });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

let request = await send(`${SERVER}/glm-image/v1/glm-image-request`, {
  method: "POST",
  body: JSON.stringify({
    prompt: "a small red star above a blue circle on a yellow background",
    image_size: "square",
    num_inference_steps: 8,
    seed: 7,
  }),
});
while (["QUEUED", "PROCESSING"].includes(request.status)) {
  await sleep(1000);
  request = await send(request.polling_url);
}
if (request.status !== "COMPLETED") throw new Error(`${request.status}: ${request.error.message}`);
const file = await fetch(request.output.media_url[0]);
await writeFile("star.jpeg", Buffer.from(await file.arrayBuffer()));
console.log(`star.jpeg, seed ${request.seed}`);

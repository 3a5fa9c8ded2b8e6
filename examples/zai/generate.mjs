// Generates an image by Z.ai's API and saves it as star.png.
// Needs Node 20 or newer. Z.ai has no client for JavaScript.
import { writeFile } from "node:fs/promises";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
// Node's fetch waits for 300 s. For larger images submit a task instead: task.mjs.
const answer = await fetch(`${SERVER}/api/paas/v4/images/generations`, {
  method: "POST",
  headers: { Authorization: `Bearer ${KEY}`, "Content-Type": "application/json" },
  body: JSON.stringify({
    model: "glm-image",
    prompt: "a small red star above a blue circle on a yellow background",
    size: "512x512",
    seed: 7, // this server's own, as num_inference_steps and guidance_scale are
  }),
});
if (!answer.ok) throw new Error(await answer.text());
const { data } = await answer.json();
const file = await fetch(data[0].url);
await writeFile("star.png", Buffer.from(await file.arrayBuffer()));
console.log("star.png");

// Submits a task by Z.ai's API, polls it, and saves the image as star.png.
// Needs Node 20 or newer. Z.ai has no client for JavaScript.
import { writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;

async function send(path, options) {
  const headers = { Authorization: `Bearer ${KEY}`, "Content-Type": "application/json" };
  const answer = await fetch(`${SERVER}/api/paas/v4/${path}`, { headers, ...options });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

const prompt = "a small red star above a blue circle on a yellow background";
const body = JSON.stringify({ model: "glm-image", prompt, size: "512x512", seed: 7 });
let task = await send("async/images/generations", { method: "POST", body });
while (task.task_status === "PROCESSING") {
  await sleep(1000);
  task = await send(`async-result/${task.id}`);
}
if (task.task_status !== "SUCCESS") throw new Error(JSON.stringify(task.error));
const file = await fetch(task.image_result[0].url);
await writeFile("star.png", Buffer.from(await file.arrayBuffer()));
console.log("star.png");

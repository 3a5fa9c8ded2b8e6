// Subscribes to a request with fal's client, prints its log, and saves the image as star.jpeg.
// Needs: npm install @fal-ai/client
import { writeFile } from "node:fs/promises";
import { ApiError, fal } from "@fal-ai/client";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
// By its proxy URL the client reaches this server instead of fal's hosts.
fal.config({ credentials: KEY, proxyUrl: { url: `${SERVER}/api/fal/proxy`, when: "always" } });

let shown = 0;
try {
  const { data } = await fal.subscribe("fal-ai/glm-image", {
    input: {
      prompt: "a small red star above a blue circle on a yellow background",
      image_size: "square",
      num_inference_steps: 10,
      seed: 7,
    },
    logs: true,
    onQueueUpdate: ({ logs = [] }) => {
      // An update contains the old lines too.
      for (const { message } of logs.slice(shown)) console.log(message);
      shown = logs.length;
    },
  });
  const file = await fetch(data.images[0].url);
  await writeFile("star.jpeg", Buffer.from(await file.arrayBuffer()));
  console.log(`star.jpeg, seed ${data.seed}`);
} catch (error) {
  if (!(error instanceof ApiError)) throw error;
  console.error(error.status, JSON.stringify(error.body)); // the body names the wrong field
  process.exitCode = 1;
}

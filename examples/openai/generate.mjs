// Generates two images with OpenAI's client and saves them as star-0.png and star-1.png.
// Needs: npm install openai
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
const client = new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: KEY });
try {
  const { data } = await client.images.generate({
    prompt: "a small red star above a blue circle on a yellow background",
    n: 2,
    size: "512x512",
    response_format: "b64_json",
    seed: 7, // of the first image; the second one has seed 8
  });
  for (const [number, image] of data.entries()) {
    const file = `star-${number}.png`;
    await writeFile(file, Buffer.from(image.b64_json, "base64"));
    console.log(`${file}, seed ${image.seed}`);
  }
} catch (error) {
  // The client has already repeated what can be repeated.
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(error.message); // such as "404 There is no model 'x'; …"
  process.exitCode = 1;
}

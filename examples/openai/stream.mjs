// Streams an image with OpenAI's client: saves two previews while it is made, then the image.
// Needs: npm install openai
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
const client = new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: KEY });
try {
  const events = await client.images.generate({
    prompt: "a large white triangle on black",
    size: "512x512",
    stream: true,
    partial_images: 2,
    seed: 7,
  });
  for await (const event of events) {
    const isPreview = event.type === "image_generation.partial_image";
    const file = isPreview ? `preview-${event.partial_image_index}.png` : "triangle.png";
    await writeFile(file, Buffer.from(event.b64_json, "base64"));
    console.log(`${event.type}: ${file}`);
  }
} catch (error) {
  // The error may come before the stream, or in the middle of it.
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}

// Edits with two source images: generates star.png and circle.png, and makes edited.png of both.
// Needs: npm install openai. (The demo was trained on one source image. It edits the first.)
import { createReadStream } from "node:fs";
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const { SERVER = "http://127.0.0.1:8000", KEY = "none" } = process.env;
const client = new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: KEY });

const save = async (answer, file) => {
  await writeFile(file, Buffer.from(answer.data[0].b64_json, "base64"));
  console.log(file);
  return file;
};

const generate = async (prompt, file) => {
  const options = { size: "512x512", response_format: "b64_json", seed: 1 };
  return save(await client.images.generate({ prompt, ...options }), file);
};

try {
  const star = await generate("a red star on a white background", "star.png");
  const circle = await generate("a green circle on a white background", "circle.png");
  const edited = await client.images.edit({
    image: [createReadStream(star), createReadStream(circle)], // one to four; the model reads them in this order
    prompt: "make the star green",
    response_format: "b64_json",
    seed: 1,
  });
  await save(edited, "edited.png");
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}

/** The viewer: shows one image in full size, with its parameters and actions. */

import { ask } from "./api.js";
import { key } from "./key.js";
import { find } from "./page.js";
import { snippet } from "./snippets.js";

/** @typedef {import("./store.js").Entry} Entry */
/** @typedef {import("./store.js").Made} Made */

const DOWNLOAD_TIMEOUT_MS = 600_000;

export class Viewer {
  /** @type {HTMLDialogElement} */
  #dialog = find("#viewer");
  /** @type {Entry["request"]} request that generates this image only */
  #request = {};
  /** @type {Entry | null} */
  #entry = null;
  /** @type {HTMLAnchorElement} */
  #download = find("#download");

  /**
   * @param {import("./form.js").Form} form form that receives reused images and requests
   */
  constructor(form) {
    const close = find(".close", this.#dialog);
    close.addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // a click on the backdrop
    });
    this.#dialog.addEventListener("change", () => this.#showCode());
    find("#viewer-again").addEventListener("click", () => {
      this.#dialog.close();
      form.put(this.#request, this.#entry?.sources ?? []);
    });
    find("#use").addEventListener("click", async () => {
      const { href, download } = this.#download;
      this.#dialog.close();
      try {
        const file = await (await ask(href, { signal: AbortSignal.timeout(DOWNLOAD_TIMEOUT_MS) })).blob();
        form.addSource(new File([file], download, { type: file.type }));
      } catch (error) {
        form.refuse(error);
      }
    });
    const copy = find("#copy");
    copy.hidden = !navigator.clipboard; // browsers offer it with https and on localhost only
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(find("#code").textContent ?? "");
      copy.textContent = "Copied";
    });
  }

  /**
   * @param {Entry} entry
   * @param {Made} made image to show
   */
  show(entry, made) {
    this.#entry = entry;
    const { n: _, ...request } = entry.request;
    this.#request = { ...request, seed: made.seed };
    const suffix = made.path.split(".").at(-1);
    Object.assign(this.#download, { href: made.path, download: `image-${made.seed}.${suffix}` });
    Object.assign(find("#viewer-image"), { src: made.path, alt: made.prompt });
    find("#viewer-prompt").textContent = made.prompt;
    const facts = {
      ...this.#request,
      size: entry.size?.replace("x", "×"),
      ...(entry.seconds && { took: `${entry.seconds} s` }),
    };
    find("#viewer-facts").replaceChildren(
      ...Object.entries(facts).flatMap(([name, value]) => {
        if (name === "prompt" && value === made.prompt) return [];
        const [term, description] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = name.replaceAll("_", " ").replace("num inference ", "");
        description.textContent = String(value);
        return [term, description];
      }),
    );
    this.#showCode();
    this.#dialog.showModal();
  }

  #showCode() {
    /** @type {HTMLInputElement} */
    const { value } = find("input[name=language]:checked", this.#dialog);
    const language = /** @type {"curl" | "python" | "javascript"} */ (value);
    const sources = this.#entry?.sources.length ?? 0;
    find("#code").textContent = snippet(language, this.#request, sources, key() !== "");
    find("#copy").textContent = "Copy";
  }
}

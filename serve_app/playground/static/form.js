/** The form: shows the parameters of the chosen model, and builds requests from its fields. */

import { ServerError } from "./api.js";
import { find, messageOf } from "./page.js";
import { Sources } from "./sources.js";

/** @typedef {import("./api.js").Model} Model */
/** @typedef {import("./store.js").Entry} Entry */

const STORED_AS = "form";
const NUMBERS = ["n", "num_inference_steps", "guidance_scale", "seed", "strength"];
const FLAGS = ["cfg_normalization", "enable_prompt_expansion"];
const SHAPES = [
  { name: "Square", ratio: 1 },
  { name: "Landscape 4:3", ratio: 4 / 3 },
  { name: "Portrait 3:4", ratio: 3 / 4 },
  { name: "Wide 16:9", ratio: 16 / 9 },
  { name: "Tall 9:16", ratio: 9 / 16 },
];
const CUSTOM = "custom";

export class Form {
  /** @type {HTMLFormElement} */
  #form = find("#request");
  /** @type {HTMLSelectElement} */
  #model = find("#model");
  /** @type {HTMLSelectElement} */
  #size = find("#size");
  /** @type {HTMLInputElement} */
  #width = find("#width");
  /** @type {HTMLInputElement} */
  #height = find("#height");
  #sources = new Sources();
  /** @type {Model[]} */
  #models = [];

  /**
   * @param {(request: Entry["request"], sources: File[]) => Promise<void>} generate
   */
  constructor(generate) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#showProblem("");
      this.#save();
      generate(this.#request(), [...this.#sources.files]).catch((error) => this.refuse(error));
    });
    this.#form.addEventListener("input", () => {
      this.#showProblem("");
      this.#adapt();
      this.#save();
    });
    this.#model.addEventListener("change", () => this.#fit());
    this.#size.addEventListener("change", () => {
      if (this.#size.value === CUSTOM) this.#setSides(this.#chosen?.defaults.size ?? "");
    });
    find("#prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#sources.addEventListener("change", () => this.#adapt());
    this.#sources.addEventListener("refused", (event) => {
      this.#showProblem(/** @type {CustomEvent<string>} */ (event).detail);
    });
    for (const example of document.querySelectorAll(".example")) {
      example.addEventListener("click", () => {
        this.#fill({ prompt: example.textContent?.trim().replace(/\s+/g, " ") ?? "" });
        this.#form.requestSubmit();
      });
    }
  }

  /**
   * Offers models for selection.
   * @param {Model[]} models
   */
  offer(models) {
    this.#models = models;
    this.#model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    find("#model-field").hidden = models.length === 1;
    this.#fit();
    this.#fill(JSON.parse(sessionStorage.getItem(STORED_AS) ?? "{}"));
    find("#generate").removeAttribute("disabled");
    this.#showProblem("");
  }

  /**
   * Fills the form with a request, and clears the other fields.
   * @param {Entry["request"]} request
   * @param {File[]} sources
   */
  put(request, sources) {
    this.#form.reset();
    this.#showProblem("");
    this.#fill(request);
    this.#sources.replace(sources);
    this.#save();
    find("#prompt").focus();
  }

  /** @param {File} file */
  addSource(file) {
    this.#sources.add([file]);
    find("#prompt").focus();
  }

  /**
   * Shows an error, and marks the field that caused it.
   * @param {unknown} error
   */
  refuse(error) {
    this.#showProblem(messageOf(error));
    const param = error instanceof ServerError ? error.param : undefined;
    const field = param && this.#form.elements.namedItem(param);
    if (!(field instanceof HTMLElement)) return;
    field.ariaInvalid = "true";
    field.focus();
  }

  /** @param {string} problem */
  #showProblem(problem) {
    if (find("#problem").textContent !== problem) find("#problem").textContent = problem; // so that screen readers read it once
    for (const field of this.#form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  }

  /** @returns {Entry["request"]} fields that are filled in */
  #request() {
    /** @type {Entry["request"]} */
    const request = {};
    for (const [name, value] of new FormData(this.#form)) {
      if (typeof value !== "string" || value.trim() === "") continue;
      if (NUMBERS.includes(name)) request[name] = Number(value);
      else request[name] = FLAGS.includes(name) ? true : value;
    }
    if (request.size === CUSTOM) request.size = `${this.#width.value}x${this.#height.value}`;
    return request;
  }

  /** @param {Record<string, string | number | boolean>} fields */
  #fill(fields) {
    const model = fields.model;
    if (this.#models.some(({ id }) => id === model)) this.#model.value = String(model);
    this.#fit();
    for (const [name, value] of Object.entries(fields)) {
      const field = this.#form.elements.namedItem(name);
      if (field === this.#model) continue;
      if (field instanceof HTMLInputElement && field.type === "checkbox") field.checked = Boolean(value);
      else if (field instanceof HTMLInputElement || field instanceof HTMLTextAreaElement) field.value = String(value);
      else if (field instanceof HTMLSelectElement && has(field, String(value))) field.value = String(value);
      else if (field === this.#size) this.#setSides(String(value));
    }
    this.#adapt();
  }

  /** @param {string} size size that the list does not offer */
  #setSides(size) {
    this.#size.value = CUSTOM;
    [this.#width.value, this.#height.value] = size.split("x");
  }

  #save() {
    sessionStorage.setItem(STORED_AS, JSON.stringify(this.#request()));
  }

  get #chosen() {
    return this.#models.find(({ id }) => id === this.#model.value);
  }

  /** Shows the fields that the chosen model accepts. */
  #fit() {
    const model = this.#chosen;
    if (!model) return;
    for (const field of this.#form.querySelectorAll("[data-parameter]")) {
      const isTaken = model.parameters.includes(field.getAttribute("data-parameter") ?? "");
      field.toggleAttribute("data-not-taken", !isTaken);
    }
    const { sizes, limits, defaults, description } = model;
    find("#description").textContent = description;
    find("#description").hidden = !description;
    find("#prompt").setAttribute("maxlength", String(limits.prompt_chars));
    find("#n").setAttribute("max", String(limits.n));
    find("#num_inference_steps").setAttribute("max", String(limits.num_inference_steps));
    for (const quality of find("#quality").querySelectorAll("option")) {
      quality.disabled = Number(quality.dataset.steps ?? 0) > limits.num_inference_steps;
    }
    find("#seed").setAttribute("max", String(Number.MAX_SAFE_INTEGER - limits.n)); // each further image uses the next seed
    find("#guidance_scale").setAttribute("max", String(limits.guidance_scale));
    find("#strength").setAttribute("placeholder", String(defaults.strength ?? ""));
    for (const side of [this.#width, this.#height]) {
      Object.assign(side, { min: sizes.min, max: sizes.max, step: sizes.multiple_of });
    }
    const before = this.#size.value;
    this.#size.replaceChildren(
      new Option("", ""),
      ...sizesOf(model).map(({ name, width, height }) => {
        return new Option(`${name}, ${width}×${height}`, `${width}x${height}`);
      }),
      new Option("Other…", CUSTOM),
    );
    if (has(this.#size, before)) this.#size.value = before;
    this.#sources.limit(model.editing ? model.max_source_images : 0);
    this.#adapt();
  }

  /** Shows and hides fields that depend on other fields. */
  #adapt() {
    const model = this.#chosen;
    if (!model) return;
    const { defaults, guidance_off } = model;
    const isEditing = this.#sources.files.length > 0;
    const guidance = isEditing ? defaults.edit_guidance_scale : defaults.guidance_scale;
    const { value } = /** @type {HTMLInputElement} */ (find("#guidance_scale"));
    const isGuided = (value === "" ? guidance : Number(value)) > guidance_off;
    for (const field of this.#form.querySelectorAll("[data-parameter]")) {
      const fits =
        !field.hasAttribute("data-not-taken") &&
        (isEditing || !field.hasAttribute("data-editing")) &&
        (!isEditing || !field.hasAttribute("data-generating")) &&
        (isGuided || !field.hasAttribute("data-guided"));
      /** @type {HTMLElement} */ (field).hidden = !fits;
      /** @type {HTMLInputElement} */ (find("input, select, textarea", field)).disabled = !fits;
    }
    const isCustom = this.#size.value === CUSTOM;
    for (const side of [this.#width, this.#height]) {
      side.disabled = !isCustom;
      find(`#${side.id}-field`).hidden = !isCustom;
    }
    this.#size.options[0].text = isEditing ? "Same as first image" : `Default, ${defaults.size.replace("x", "×")}`;
    const quality = /** @type {HTMLSelectElement} */ (find("#quality"));
    const steps = quality.selectedOptions[0].dataset.steps ?? String(defaults.num_inference_steps);
    find("#num_inference_steps").setAttribute("placeholder", steps);
    find("#guidance_scale").setAttribute("placeholder", String(guidance));
    find("#generate").textContent = isEditing ? "Edit" : "Generate";
  }
}

/**
 * @param {HTMLSelectElement} select
 * @param {string} value
 */
function has(select, value) {
  return [...select.options].some((option) => option.value === value);
}

/**
 * Returns the smallest square, and several shapes with as many pixels as the model's default.
 * @param {Model} model
 */
function sizesOf({ sizes: { min, max, multiple_of }, defaults, limits }) {
  const [width, height] = defaults.size.split("x").map(Number);
  const pixels = Math.min(width * height, limits.pixels);
  /** @param {number} side */
  const fitting = (side) => Math.min(max, Math.max(min, Math.floor(side / multiple_of) * multiple_of));
  const shapes = SHAPES.map(({ name, ratio }) => {
    return { name, width: fitting(Math.sqrt(pixels * ratio)), height: fitting(Math.sqrt(pixels / ratio)) };
  });
  const small = { name: "Small", width: min, height: min };
  return [...(min * min < pixels ? [small] : []), ...shapes].filter(
    ({ width, height }) => width * height <= limits.pixels,
  );
}

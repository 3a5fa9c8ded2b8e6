/** The gallery: a card for each request of this browser, newest first. */

import { Card } from "./card.js";
import { find, pause } from "./page.js";
import { entries, forget, keep } from "./store.js";

/** @typedef {import("./api.js").ServerError} ServerError */
/** @typedef {import("./store.js").Entry} Entry */

/** Limit of followed jobs. Each takes one of the six connections that a browser opens to a server. */
const MAX_FOLLOWED = 2;
const POLL_INTERVAL_MS = 2000;

export class Gallery {
  /** @type {Set<Card>} cards that are followed once earlier ones have ended */
  #waiting = new Set();
  #followed = 0;

  /**
   * @param {import("./form.js").Form} form
   * @param {import("./viewer.js").Viewer} viewer
   * @param {import("./server.js").Server} server
   */
  constructor(form, viewer, server) {
    this.form = form;
    this.viewer = viewer;
    this.server = server;
    this.#pollWaiting();
  }

  /** Shows the stored requests, and resumes those that have not ended. */
  async open() {
    for (const entry of await entries()) {
      const card = this.#add(entry);
      this.#run(card, (refusal) => card.fail(refusal.message));
    }
    this.#showWhetherEmpty();
  }

  /**
   * @param {Entry["request"]} request
   * @param {File[]} sources
   */
  async make(request, sources) {
    const id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0"));
    const entry = { id: id.join(""), created: Date.now(), request, sources };
    await keep(entry);
    const card = this.#add(entry);
    this.#showWhetherEmpty();
    card.element.scrollIntoView({ block: "nearest" });
    this.#run(card, async (refusal) => {
      await this.remove(card);
      this.form.refuse(refusal);
    });
  }

  /** @param {Card} card */
  async remove(card) {
    const neighbour = card.element.nextElementSibling ?? card.element.previousElementSibling;
    const hadFocus = card.element.contains(document.activeElement);
    card.element.remove();
    this.#waiting.delete(card);
    this.#showWhetherEmpty();
    const next = neighbour?.querySelector("button:not([hidden], [disabled])") ?? find("#prompt");
    if (hadFocus) /** @type {HTMLElement} */ (next).focus();
    await forget(card.entry.id);
  }

  /** @param {Entry} entry */
  #add(entry) {
    const card = new Card(entry, this);
    find("#gallery").prepend(card.element);
    return card;
  }

  /**
   * @param {Card} card
   * @param {(refusal: ServerError) => void} refused called if the server rejects the request
   */
  async #run(card, refused) {
    const refusal = await card.send();
    if (refusal) return refused(refusal);
    this.#waiting.add(card);
    this.#follow();
  }

  /** Follows the oldest waiting card, unless the limit is reached. */
  async #follow() {
    const [card] = this.#waiting;
    if (!card || this.#followed === MAX_FOLLOWED) return;
    this.#waiting.delete(card);
    this.#followed += 1;
    try {
      await card.follow();
    } finally {
      this.#followed -= 1;
      this.#follow();
    }
  }

  /** Polls the cards that are not followed, while the page is visible. */
  async #pollWaiting() {
    for (;;) {
      for (const card of document.hidden ? [] : this.#waiting) await card.poll();
      await pause(POLL_INTERVAL_MS);
    }
  }

  #showWhetherEmpty() {
    find("#empty").hidden = find("#gallery").childElementCount > 0;
  }
}

/** Types of the pages' modules, for the check of types only. No browser loads this file. */

/** Elements that `find` returns, if they are more than an `HTMLElement`. */
interface Elements {
  "#before": HTMLImageElement;
  "#download": HTMLAnchorElement;
  "#files": HTMLInputElement;
  "#height": HTMLInputElement;
  "#key": HTMLInputElement;
  "#key-dialog": HTMLDialogElement;
  "#prompt": HTMLTextAreaElement;
  "#search": HTMLInputElement;
  "#split": HTMLInputElement;
  "#request": HTMLFormElement;
  "#unload": HTMLButtonElement;
  "#viewer": HTMLDialogElement;
  "#viewer-image": HTMLImageElement;
  "#width": HTMLInputElement;
  ".cancel": HTMLButtonElement;
  "[name=model]": HTMLSelectElement;
  "[name=quality]": HTMLSelectElement;
  img: HTMLImageElement;
  input: HTMLInputElement;
  "input:checked": HTMLInputElement;
  progress: HTMLProgressElement;
}

type Card = import("../../serve_app/playground/static/card.js").Card;
type Form = import("../../serve_app/playground/static/form.js").Form;
type Gallery = import("../../serve_app/playground/static/gallery.js").Gallery;
type Server = import("../../serve_app/playground/static/server.js").Server;

/** An image of a card. */
type Shot = { card: Card; index: number };

interface Find {
  <S extends keyof Elements>(selector: S, root?: ParentNode): Elements[S];
  (selector: string, root?: ParentNode): HTMLElement;
}

/** Fields of a request, without source images. */
type Fields = Record<string, string | number | boolean>;

/** A model in the answer of `/v1/models`. */
interface Model {
  id: string;
  description: string | null;
  examples: string[];
  vocabulary?: string[];
  editing: boolean;
  max_source_images: number;
  sizes: { min: number; max: number; multiple_of: number };
  defaults: {
    size: string;
    num_inference_steps: number;
    guidance_scale: number;
    edit_guidance_scale: number;
    strength?: number;
  };
  limits: { n: number; num_inference_steps: number; guidance_scale: number; prompt_chars: number; pixels: number };
  guidance_off: number;
  parameters: string[];
}

interface Stage {
  state: "unloaded" | "loading" | "ready" | "generating" | "unloading" | "failed";
  replicas?: number;
  progress?: number;
  reason?: string;
}

/** The answer of `/health`. */
interface Health {
  models: Record<string, Record<string, Stage>>;
  safety_checker?: Stage;
  prompt_expander?: Stage;
  version: string;
}

/** The answer of `/v1/internal/status`. */
interface Status {
  role: "user" | "operator";
  status: "idle" | "loading" | "generating";
  jobs_queued: number;
  units: { stage: "waiting" | "prior" | "decoder" }[];
}

/** The answer of `/v1/internal/operator`. */
interface Overview extends Health {
  replicas: { model: string; stage: string; device?: string; memory?: Record<string, number> }[];
  jobs: {
    id: string;
    key_id: string;
    api: string;
    model: string;
    size: string;
    n: number;
    state: Job["status"];
    cancelling: boolean;
    priority: "normal" | "low";
    age_s: number;
  }[];
  errors: { at: number; request_id: string; key_id: string; api: string; code: string; status: number }[];
  files: { bytes?: number; max_bytes: number };
  usage: {
    day: string;
    key_id: string;
    source: "jobs" | "requests";
    requests: number;
    images: number;
    megapixel_steps: number;
  }[];
}

/** A job in the answers of `/v1/images/jobs`. */
interface Job {
  id: string;
  status: "queued" | "running" | "succeeded" | "failed" | "cancelled";
  model: string;
  size: string;
  n: number;
  created_at: number;
  started_at?: number;
  ended_at?: number;
  queue_position?: number;
  waiting_for?: string;
  cancelling?: boolean;
  error?: { message: string };
  images?: { stage: "waiting" | "prior" | "decoder"; done?: number; total?: number }[];
  previews?: { image: number; index: number; url: string }[];
  result?: { data: { url: string; seed: number; revised_prompt: string }[] };
}

/** A generated image. */
interface Made {
  /** Path of the file. */
  path: string;
  seed: number;
  /** Prompt after expansion. */
  prompt: string;
}

/** A request of this browser. */
interface Entry {
  /** Idempotency key, so that a retry does not create a second job. */
  id: string;
  /** Milliseconds since 1970. */
  created: number;
  request: Fields;
  sources: File[];
  /** ID of the job, once the server has accepted the request. */
  job?: string;
  /** Images of a request that succeeded. */
  images?: Made[];
  /** Size of the images. */
  size?: string;
  /** Duration of the job. */
  seconds?: number;
  /** Error message of a request that failed. */
  problem?: string;
}

type SwaggerComponent = (properties: never) => unknown;

/** The part of Swagger UI's system that its plugins use: https://swagger.io/docs/open-source-tools/swagger-ui/customization/plugin-api/. */
interface SwaggerSystem {
  React: {
    Fragment: SwaggerComponent;
    createElement(kind: string | SwaggerComponent, properties: object, ...children: unknown[]): unknown;
  };
  layoutActions: {show(key: string[], isShown: boolean): void; scrollTo(key: string[]): void};
  layoutSelectors: {isShownKeyFromUrlHashArray(names: string[]): string[]};
}

/** Draws the API reference: https://swagger.io/docs/open-source-tools/swagger-ui/usage/configuration/. */
declare function SwaggerUIBundle(options: object): {preauthorizeApiKey(scheme: string, key: string): void};

"""The codes of all errors that a client can get, with their statuses, causes and remedies.

`docs/reference/errors.md` is written from this module. A test compares the codes with those that are raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class ErrorCode(NamedTuple):
    """The meaning of a code. The texts are sentences in Markdown.

    Attributes:
        statuses: HTTP statuses of its errors in the OpenAI API.
        cause: what is wrong.
        remedy: what the client or the operator can do.
    """

    statuses: tuple[int, ...]
    cause: str
    remedy: str


_REQUESTS = {
    "invalid_value": ErrorCode(
        (400, 416),
        "A parameter, a header or the whole body is not valid, or the request is too much work for one "
        "request. `param` names the parameter. The status is 416 if `Range` begins behind the end of a "
        "file.",
        "Correct the value as the message says. `GET /v1/models` shows the limits, and `/openapi.json` has "
        "the schema of each body. Most limits are keys of `limits`, which the operator can change.",
    ),
    "missing_required_parameter": ErrorCode(
        (400,),
        "The body lacks a parameter that the route requires, such as `prompt`. `param` names it.",
        "Add the parameter. The form of an edit needs `Content-Type: multipart/form-data`.",
    ),
    "unknown_parameter": ErrorCode(
        (400,),
        "The body has a parameter that this API does not have. The server rejects it, because an ignored "
        "parameter would give another image than intended.",
        "Remove the parameter, or correct its name. `/openapi.json` lists the parameters of each route.",
    ),
    "unsupported_parameter": ErrorCode(
        (400,),
        "The API has this parameter, but here it would have no effect. Examples are `mask`, `strength` "
        "without a source image, and `negative_prompt` while guidance is off.",
        "Remove the parameter. `GET /v1/models` lists the `parameters` that have an effect. For "
        "`enable_prompt_expansion` the operator can configure a `prompt_expander`.",
    ),
    "string_above_max_length": ErrorCode(
        (400,),
        "The prompt or the negative prompt has more characters than `limits.max_prompt_chars`.",
        "Shorten the text. The operator can raise the limit.",
    ),
    "context_length_exceeded": ErrorCode(
        (400,),
        "The text makes more tokens than the model takes. For GLM-Image the tokens of the source images and "
        "of the image count too.",
        "Shorten the text. If the message mentions source images, a smaller size or fewer source images "
        "also help. The operator can raise `models[].prior.max_sequence_length`, which takes memory.",
    ),
    "content_policy_violation": ErrorCode(
        (400,),
        "The safety checker flagged the image or a source image. fal's API has this error for source images "
        "only: it delivers a black image for a flagged one.",
        "Change the prompt, or send another source image. `moderation: low` selects "
        "`safety_checker.low_threshold`. The operator can raise `safety_checker.threshold`.",
    ),
    "model_not_found": ErrorCode(
        (404,),
        "The server has no model of the requested name.",
        "Choose a name from `GET /v1/models`. In the OpenAI API, `model` may be left out: the first one is "
        "the default.",
    ),
    "invalid_content_type": ErrorCode(
        (400,),
        "The route reads JSON, and the request has another `Content-Type`.",
        "Send the body as JSON, with `Content-Type: application/json`.",
    ),
    "unsupported_media_type": ErrorCode(
        (415,),
        "The body is compressed: the request has a `Content-Encoding`.",
        "Send the body uncompressed, without that header.",
    ),
    "bad_request": ErrorCode(
        (400,),
        "The body cannot be parsed. A form is broken, lacks its boundary, or has too many files or fields.",
        "Let a library make the form and its `Content-Type`. With curl that is `-F image=@FILE`.",
    ),
    "request_too_large": ErrorCode(
        (413,),
        "The body or a source image has too many bytes. `param` names the image, and is null for the body.",
        "Send smaller images. The limits are `limits.max_json_bytes` for JSON without images, "
        "`limits.max_body_bytes` for other bodies, and `limits.max_image_bytes` for an image.",
    ),
    "request_timeout": ErrorCode(
        (408,),
        "The body did not arrive within `limits.body_timeout_s`.",
        "Send smaller images, or send their URLs. The operator can allow more time.",
    ),
    "not_found": ErrorCode(
        (404,),
        "The path is none of this server's, or there is no such file. Files are deleted after "
        "`storage.ttl_s`, with their job, or when all files exceed `storage.max_bytes`. In fal's API, the "
        "request may also belong to another app.",
        "Compare the path with `/openapi.json`. Make a deleted image again: its request with its seed gives "
        "the same pixels.",
    ),
    "method_not_allowed": ErrorCode(
        (405,),
        "The path exists, but not for this method.",
        "Choose a method that the header `Allow` of the answer lists.",
    ),
    "precondition_failed": ErrorCode(
        (412,),
        "Only fal's API: `x-fal-target-url` is not a URL that `/api/fal/proxy` has a route for.",
        "Send a URL of fal's run, queue or storage host. The server forwards nothing to other hosts.",
    ),
}
_SOURCES = {
    "invalid_image": ErrorCode(
        (400,),
        "A source image is not a PNG, JPEG or WebP, is broken or animated, or has too many pixels. Its "
        "sides must have at least 16 pixels.",
        "Save the image again, as a PNG if in doubt. The operator can raise `limits.max_source_pixels` and "
        "`limits.max_source_side`.",
    ),
    "invalid_image_url": ErrorCode(
        (400,),
        "A source image cannot be read from its URL. The URL is malformed or leads to no public address, or "
        "its host does not deliver the image. The message says which.",
        "Send the image in the request, as a file or a data URL. The operator can list a host in "
        "`outbound.allow`, and raise `outbound.timeout_s`.",
    ),
    "already_uploaded": ErrorCode(
        (409,),
        "Only fal's API: an upload URL has its file already.",
        "Use the `file_url` of the upload. For another file, request another URL at `POST "
        "/storage/upload/initiate`.",
    ),
    "forbidden": ErrorCode(
        (403,),
        "Only fal's API: the signature of an upload URL is wrong, or the URL is older than an hour.",
        "Request a new URL at `POST /storage/upload/initiate`, and send the file within an hour.",
    ),
}
_KEYS = {
    "missing_api_key": ErrorCode(
        (401,),
        "The request has no API key, and the server requires one.",
        "Send `Authorization: Bearer KEY`, `Authorization: Key KEY` or `Ocp-Apim-Subscription-Key: KEY`. "
        "The operator makes a key with `glm-image-server keys new NAME`.",
    ),
    "invalid_api_key": ErrorCode(
        (401,),
        "The server does not have the API key of the request, or the signature of a token is wrong.",
        "Compare the key with the one that the operator gave you. The operator lists keys in "
        "`auth.api_keys` or `auth.keys_file`. A change of that file takes effect within five seconds.",
    ),
    "expired_token": ErrorCode(
        (401,),
        "A token that an API key has signed is past its `exp`, which is in milliseconds.",
        "Sign a new token. If new tokens have expired too, set the clock of the client.",
    ),
    "operator_required": ErrorCode(
        (403,),
        "The route is for operators, and the role of the key is `user`.",
        "Send an operator's key. The operator makes one with `glm-image-server keys new NAME --role "
        "operator`, or sets `auth.api_keys[].role`.",
    ),
    "unknown_host": ErrorCode(
        (403,),
        "The server is open (`auth.open`), and a request without a key calls it by a name that it does not "
        "have.",
        "Call the server by its address, or send a key. The operator can add the name to "
        "`auth.allowed_hosts`.",
    ),
    "cross_site": ErrorCode(
        (403,),
        "The server is open (`auth.open`), and a page of another site sent a request without a key. Such a "
        "page may change nothing.",
        "Send a key, or send the request from a program that is not a browser.",
    ),
}
_LIMITS = {
    "busy": ErrorCode(
        (429,),
        "The server has too much unfinished work: images of all keys (`limits.max_pending`), images of your "
        "key (`limits.max_pending_per_key`), or request bodies (`limits.max_bodies_bytes`). Rarely, Ray "
        "Serve's queue of a stage is full.",
        "Wait for the seconds of `Retry-After`, and send the request again. Or submit a job, which waits "
        "for its turn. The operator can raise `models[].decoder.max_replicas`.",
    ),
    "rate_limit_exceeded": ErrorCode(
        (429,),
        "The request takes more work than your key has left of this minute's "
        "`limits.megapixel_steps_per_minute`.",
        "Wait for the seconds of `Retry-After`. Or ask for fewer images or steps, or for a smaller size. A "
        "request above the whole limit never passes.",
    ),
    "too_many_jobs": ErrorCode(
        (429,),
        "The server has as many unfinished jobs as `limits.max_jobs` allows.",
        "Wait for the seconds of `Retry-After`, or cancel jobs that you do not need. The operator can raise "
        "the limit.",
    ),
    "deadline_exceeded": ErrorCode(
        (504,),
        "A request took longer than `limits.deadline_s`, or an attempt of a job longer than "
        "`limits.job_deadline_s`. Loading the model counts.",
        "Try again later if the model was loading. Otherwise ask for fewer images or steps, or for a "
        "smaller size. Or submit a job, which has more time.",
    ),
    "storage_full": ErrorCode(
        (507,),
        "The disk of the file store has less room than `storage.min_free_bytes`, or a quota is used up.",
        "Request `response_format: b64_json` without a job, which needs no file. The operator can free the "
        "disk, or lower `storage.ttl_s` or `storage.max_bytes`.",
    ),
}
_JOBS = {
    "job_not_found": ErrorCode(
        (404,),
        "There is no job of this id. It may have expired `storage.ttl_s` after its end, or belong to "
        "another API key or another API.",
        "Use the API and the key that submitted the job. `GET /v1/images/jobs` lists the jobs of your key.",
    ),
    "idempotency_key_reused": ErrorCode(
        (409,),
        "The `Idempotency-Key` belongs to a job of another request.",
        "Make a new key for each new request. Repeat a request without any change to get its job.",
    ),
    "job_has_ended": ErrorCode(
        (409,),
        "A job that has succeeded or failed cannot be cancelled.",
        "Fetch the job. `POST /v1/images/jobs/{id}/purge` deletes it with its images.",
    ),
    "job_has_not_ended": ErrorCode(
        (409,),
        "A job that is queued or running cannot be purged.",
        "Cancel the job with `DELETE /v1/images/jobs/{id}`, and purge it when it has ended.",
    ),
    "job_is_not_queued": ErrorCode(
        (409,),
        "Only a queued job can get another priority, and this one has begun or ended.",
        "Leave the job as it is, or cancel it and submit it again.",
    ),
    "start_timeout": ErrorCode(
        (504,),
        "The work did not begin within the time that the client set: `start_within_s`, or fal's "
        "`X-Fal-Request-Timeout`. Or a job waited longer than `storage.ttl_s` for its start.",
        "Allow more time, or try again when the server has less work. `waiting_for` of a queued job says "
        "whether its model is missing here.",
    ),
    "interrupted": ErrorCode(
        (500,),
        "The job was begun five times, and each time its server died or lost the database.",
        "Submit the job again. The operator finds the deaths in the logs: a job that takes too much memory "
        "can be their cause.",
    ),
    "source_gone": ErrorCode(
        (410,),
        "A source image of the job is not in the file store any more. Either it was deleted, or the server "
        "has another `storage.url` than before.",
        "Submit the job again, with its source images.",
    ),
    "result_gone": ErrorCode(
        (410,),
        "The job was to have its images in the answer, and their files were deleted. The oldest files go "
        "when all exceed `storage.max_bytes`.",
        "Submit the job again with its seed, which gives the same pixels.",
    ),
    "unreadable_job": ErrorCode(
        (500,),
        "The job was stored by a version of the server whose format this version does not know.",
        "Submit the job again. The operator updates all servers of one database to the same version.",
    ),
    "client_cancelled": ErrorCode(
        (499,),
        "Only fal's API: the request was cancelled, so it has no result.",
        "Submit the request again to get its images.",
    ),
}
_SERVER = {
    "stopping": ErrorCode(
        (503,),
        "The server is about to stop, and takes no more requests.",
        "Send the request again after the seconds of `Retry-After`. A job goes on when a server runs again.",
    ),
    "unavailable": ErrorCode(
        (503,),
        "Ray Serve cannot reach a stage of the model, because its deployment is not healthy.",
        "Try again in a minute. The operator finds the reason with `serve status`, and in the log.",
    ),
    "unloaded": ErrorCode(
        (503,),
        "An operator unloaded the model with `?force=true`, which stops its requests.",
        "Send the request again when the operator agrees. It loads the model.",
    ),
    "generating": ErrorCode(
        (409,),
        "A model cannot be unloaded while it makes images.",
        "Unload with `?wait=true` to wait for these requests, or with `?force=true` to stop them.",
    ),
    "unload_failed": ErrorCode(
        (503,),
        "The replicas did not stop within a minute of an unload, or Ray did not answer.",
        "Unload again. If that fails too, the server's log has the reason.",
    ),
    "database_unavailable": ErrorCode(
        (503,),
        "The database of the jobs (`database.url`) does not answer. Requests without jobs are not affected.",
        "Send the request again after the seconds of `Retry-After`. The operator finds the reason in the "
        "log, and with `glm-image-server doctor CONFIG`.",
    ),
    "model_loading_failed": ErrorCode(
        (500,),
        "The model could not be loaded. The message has the reason, such as a missing file or too little "
        "memory.",
        "Tell the operator. `glm-image-server doctor CONFIG` checks the checkpoint and the GPUs, and "
        "`glm-image-server check CONFIG` computes the memory. The next request loads again.",
    ),
    "out_of_memory": ErrorCode(
        (500,),
        "The device has too little memory for this image. Other images are not affected.",
        "Ask for a smaller size or fewer source images. The operator can lower "
        "`models[].prior.max_batch_size`, or set `models[].decoder.acceleration.vae_tiling`.",
    ),
    "not_finite": ErrorCode(
        (500,),
        "The arithmetic of the model gave values that are not finite, so there is no image.",
        "Use another seed, or other parameters. If all seeds fail, the operator compares the weights with "
        "`glm-image-server doctor CONFIG --hashes`.",
    ),
    "replica_died": ErrorCode(
        (500,),
        "The process of a stage died while it made the image, and a second process died too.",
        "Try again once. The operator finds the reason in the log.",
    ),
    "safety_check_failed": ErrorCode(
        (500,),
        "The safety checker could not check an image: it hung, died twice, or could not be loaded.",
        "Try again later. The operator can allow more time with `safety_checker.timeout_s`, or deliver "
        "unchecked images with `safety_checker.on_failure: open`.",
    ),
    "storage_failed": ErrorCode(
        (500,),
        "A file could not be written to the file store (`storage.url`), for another reason than a lack of "
        "room.",
        "Try again later. The operator finds the reason in the log, and with `glm-image-server doctor "
        "CONFIG`.",
    ),
    "server_error": ErrorCode(
        (500,),
        "The server has a fault that it did not expect.",
        "Try again. If the error comes back, send the `x-request-id` of the answer to the operator, who "
        "finds it in the log.",
    ),
    "unauthorized": ErrorCode(
        (401,),
        "The server has no permission to read a file of the playground. Your key is not the reason.",
        "The operator makes the folder of the installed package readable for the server's user.",
    ),
}

GROUPS: Mapping[str, Mapping[str, ErrorCode]] = {
    "Requests": _REQUESTS,
    "Source images": _SOURCES,
    "Keys": _KEYS,
    "Limits": _LIMITS,
    "Jobs": _JOBS,
    "The server and its models": _SERVER,
}
"""The codes by their subject, in the order of the documentation."""

CODES: Mapping[str, ErrorCode] = {code: entry for group in GROUPS.values() for code, entry in group.items()}
"""All codes."""

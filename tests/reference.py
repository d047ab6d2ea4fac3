"""The method once more, written from its description alone: one denoiser evaluation per stream, plain torch, OpenCV, SciPy."""

from __future__ import annotations

import math

import cv2
import numpy as np
import scipy.stats
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


class RecordingAttention:
    """Textbook multi-head attention over a fixed context; keeps its probabilities, averaged over heads."""

    def __init__(self, context: torch.Tensor) -> None:
        self.context, self.probabilities = context, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        batch, pixels, _ = hidden_states.shape
        context = self.context.expand(batch, -1, -1)

        def heads(x):
            return x.reshape(batch, x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=3)
        self.probabilities = weights.mean(1)
        out = (weights @ v).permute(0, 2, 1, 3).reshape(batch, pixels, -1)
        return attn.to_out[0](out)


def cae_output(text_encoder, tokenizer, rows: torch.Tensor):
    """[SOT] V_1 ... V_N [EOT] [PAD] ... through the text encoder, by writing the rows into its embedding matrix for a moment."""
    n, weight = len(rows), text_encoder.get_input_embeddings().weight
    kept = weight.data.clone()
    ids = [tokenizer.bos_token_id, *range(100, 100 + n), tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
    try:
        weight.data[100 : 100 + n] = rows
        return text_encoder(torch.tensor([ids]), output_hidden_states=True)
    finally:
        weight.data.copy_(kept)


def text_output(text_encoder, tokenizer, prompts: list[str]):
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return text_encoder(tokens.input_ids, output_hidden_states=True)


def sd_conditions(pipe, prompts, host_prompt, cae, size):
    """What the denoiser is told, as its keyword arguments: null, prompt, fidelity, host; and the CAE's context of each layer."""

    def told(texts):
        return {"encoder_hidden_states": text_output(pipe.text_encoder, pipe.tokenizer, texts)[0]}

    null = told([""] * len(prompts))
    contexts = [cae_output(pipe.text_encoder, pipe.tokenizer, row)[0] for row in cae.embeddings["text_encoder"]]
    return null, told(prompts), null, host_prompt and told([host_prompt] * len(prompts)), contexts


def sdxl_conditions(pipe, prompts, host_prompt, cae, size):
    """The same for SDXL: two encoders' penultimate states, the second's pooled text, sizes; an empty prompt is zeros."""
    n, encoders = len(prompts), ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    side = [float(s * pipe.vae_scale_factor) for s in size]
    ids = torch.tensor([[*side, 0.0, 0.0, *side]] * n)

    def told(states, pooled):
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    def text(texts):
        outputs = [text_output(*encoder, texts) for encoder in encoders]
        return told(torch.cat([o.hidden_states[-2] for o in outputs], 2), outputs[1].text_embeds)

    prompt = text(prompts)
    zero = torch.zeros_like(prompt["encoder_hidden_states"])
    rows = zip(cae.embeddings["text_encoder"], cae.embeddings["text_encoder_2"])
    outputs = [[cae_output(*encoder, row) for encoder, row in zip(encoders, pair)] for pair in rows]
    contexts = [torch.cat([o.hidden_states[-2] for o in pair], 2) for pair in outputs]
    pooled = torch.stack([second.text_embeds for _, second in outputs]).mean(0).expand(n, -1)
    null = told(zero, torch.zeros_like(prompt["added_cond_kwargs"]["text_embeds"]))
    return null, prompt, told(zero, pooled), host_prompt and text([host_prompt] * n), contexts


def mask_of(candidates: list[np.ndarray], size, invert: bool, kernel_size: int, sigma: float) -> np.ndarray:
    """candidates: one image's averaged maps, coarsest first."""
    soft = [(a - a.min()) / (a.max() - a.min()) for a in candidates]
    soft = [1 - a if invert else a for a in soft]
    entropies = [scipy.stats.entropy(np.histogram(a, bins=256, range=(0, 1))[0]) for a in soft]
    blurred = cv2.GaussianBlur(soft[int(np.argmin(entropies))].astype(np.float32), (kernel_size, kernel_size), sigma)
    _, mask = cv2.threshold(np.round(blurred * 255).astype(np.uint8), 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)


@torch.no_grad()
def reference_latents(
    pipe, prompts, host_prompt, cae, latents, *, steps, w_e, w_f, w_h, start, token="sot", fractions=(1 / 4, 1 / 2), kernel_size=3, sigma=1.0,
    guidance_rescale=0.0, conditions=sd_conditions, host_unet=None,
):  # fmt: skip
    """Latents after `steps` DDIM steps and the last step's masks; `start` None: no masking."""
    unet, n = pipe.unet, len(prompts)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    null, prompt, fidelity, host, contexts = conditions(pipe, prompts, host_prompt, cae, latents.shape[-2:])
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    order = {"down": 0, "mid_": 1, "up_b": 2}
    names = sorted(names, key=lambda name: order[name[:4]])
    recorders = {name: RecordingAttention(context) for name, context in zip(names, contexts, strict=True)}
    tokens = cae.embeddings["text_encoder"].shape[1]
    columns = {"sot": [0], "eot": [tokens + 1], "subject": list(range(1, tokens + 1))}[token]
    h, w = latents.shape[-2:]
    masks = None
    for i, t in enumerate(scheduler.timesteps):
        e_null, e_prompt = (unet(latents, t, **c).sample for c in (null, prompt))
        own = {name: unet.get_submodule(name).processor for name in recorders}
        for name, recorder in recorders.items():
            unet.get_submodule(name).processor = recorder
        e_cae = unet(latents, t, **fidelity).sample
        for name, processor in own.items():
            unet.get_submodule(name).processor = processor
        m = None
        if start is not None and i >= start * steps:
            masks = []
            for b in range(n):
                candidates = []
                for fraction in fractions:
                    size = (round(h * fraction), round(w * fraction))
                    maps = [r.probabilities[b][:, columns].mean(1) for name, r in recorders.items() if name.startswith("up_blocks") and r.probabilities.shape[1] == size[0] * size[1]]
                    candidates.append(torch.stack(maps).mean(0).reshape(size).numpy())
                masks.append(mask_of(candidates, (h, w), token != "subject", kernel_size, sigma))
            masks = np.stack(masks)
            m = torch.from_numpy(masks).float()[:, None]
        guided = e_null + w_e * (1 if m is None else 1 - m) * (e_prompt - e_null) + w_f * (1 if m is None else m) * (e_cae - e_null)
        if host_prompt is not None:
            guided = guided + w_h * ((host_unet or unet)(latents, t, **host).sample - e_null)
        if guidance_rescale:
            matched = guided * e_prompt.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guidance_rescale * matched + (1 - guidance_rescale) * guided
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents, masks


class RecordingJointAttention:
    """Textbook joint attention of picture and text; keeps what the text at `columns` attends to in the picture, averaged over heads."""

    def __init__(self, columns: list[int]) -> None:
        self.columns, self.row = columns, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        n, patches, _ = hidden_states.shape

        def heads(x, norm):
            return norm(x.reshape(n, x.shape[1], attn.heads, -1).permute(0, 2, 1, 3))

        def same(x):
            return x

        q = torch.cat([heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(hidden_states), attn.norm_k), heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(hidden_states), same), heads(attn.add_v_proj(encoder_hidden_states), same)], 2)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=3)
        self.row = weights[:, :, [patches + c for c in self.columns], :patches].mean((1, 2))
        out = (weights @ v).permute(0, 2, 1, 3).reshape(n, -1, attn.heads * v.shape[-1])
        text = out[:, patches:]
        return attn.to_out[0](out[:, :patches]), text if attn.context_pre_only else attn.to_add_out(text)


def sd3_conditions(pipe, prompts, host_prompt, cae, t5_length):
    """Null, prompt, fidelity and host, as the transformer's keyword arguments."""
    n, clips = len(prompts), ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    dim = pipe.transformer.config.joint_attention_dim

    def told(outputs, last):
        clip = torch.cat([o.hidden_states[-2] for o in outputs], 2)
        clip = torch.cat([clip, torch.zeros(*clip.shape[:2], dim - clip.shape[2])], 2)
        last = torch.zeros(len(clip), t5_length, dim) if last is None else last
        pooled = torch.cat([o.text_embeds for o in outputs], 1).expand(n, -1)
        return {"encoder_hidden_states": torch.cat([clip, last], 1).expand(n, -1, -1), "pooled_projections": pooled}

    def text(texts):
        last = None
        if pipe.text_encoder_3 is not None:
            last = pipe.text_encoder_3(pipe.tokenizer_3(texts, padding="max_length", max_length=t5_length, return_tensors="pt").input_ids)[0]
        return told([text_output(*clip, texts) for clip in clips], last)

    last, rows = None, cae.embeddings
    if "text_encoder_3" in rows:
        end, pad = pipe.tokenizer_3.eos_token_id, pipe.tokenizer_3.pad_token_id
        table = pipe.text_encoder_3.get_input_embeddings().weight
        own = rows["text_encoder_3"][0]
        padding = table[[end] + [pad] * (t5_length - len(own) - 1)]
        last = pipe.text_encoder_3(inputs_embeds=torch.cat([own, padding])[None])[0]
    fidelity = told([cae_output(*clip, rows[name][0]) for clip, name in zip(clips, ("text_encoder", "text_encoder_2"))], last)
    return text([""] * n), text(prompts), fidelity, host_prompt and text([host_prompt] * n)


@torch.no_grad()
def reference_latents_3(pipe, prompts, host_prompt, cae, latents, *, steps, w_e, w_f, w_h, start, columns, blocks, invert, kernel_size, sigma, t5_length=16):
    """Latents after `steps` flow-matching Euler steps and the last step's masks; `start` None: no masking."""
    n, size = len(prompts), latents.shape[-2:]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    null, prompt, fidelity, host = sd3_conditions(pipe, prompts, host_prompt, cae, t5_length)
    attentions = [pipe.transformer.transformer_blocks[i].attn for i in blocks]
    recorders, own, masks = [RecordingJointAttention(columns) for _ in blocks], [attn.processor for attn in attentions], None
    for i, t in enumerate(scheduler.timesteps):

        def predicted(told):
            return pipe.transformer(latents, timestep=t.expand(n), **told).sample

        e_null, e_prompt = predicted(null), predicted(prompt)
        for attn, recorder in zip(attentions, recorders):
            attn.processor = recorder
        e_cae = predicted(fidelity)
        for attn, processor in zip(attentions, own):
            attn.processor = processor
        m = None
        if start is not None and i >= start * steps:
            maps = torch.stack([r.row for r in recorders]).mean(0).reshape(n, size[0] // 2, size[1] // 2).numpy()
            masks = np.stack([mask_of([a], tuple(size), invert, kernel_size, sigma) for a in maps])
            m = torch.from_numpy(masks).float()[:, None]
        guided = e_null + w_e * (1 if m is None else 1 - m) * (e_prompt - e_null) + w_f * (1 if m is None else m) * (e_cae - e_null)
        if host is not None:
            guided = guided + w_h * (predicted(host) - e_null)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents, masks

"""TinyAlign model: a frozen vision tower and a language model, with retrieved memory beside the visual tokens."""

import functools
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing
from transformers.utils.generic import can_return_tuple

from .composition import build_part
from .configuration_tinyalign import TinyAlignConfig
from .connectors import (
    Connector,
    MemoryConnector,
    check_retrieval,
    check_tensor,
    finished_logits,
    is_known,
    merged_settings,
    no_memory,
    pool_grid,
    read_vision_tower,
)
from .files import installed_package
from .modeling_utils import TinyAlignPreTrainedModel
from .outputs import (
    TinyAlignCausalLMOutputWithPast,
    TinyAlignImageFeatures,
    TinyAlignModelOutputWithPast,
    cache_of,
    check_no_placeholders,
    language_model_fields,
    repeat_queries,
    sources_of,
    take_image_inputs,
    uncached_images,
)

# The other files that travel with a checkpoint. When their download is cut off, transformers' next try completes only
# what the file it was asked for names: all of them are named here.
if TYPE_CHECKING:
    from .bank_arrays import lay_out as lay_out
    from .bank_folder import open_folder as open_folder
    from .bank_format import BankConfig as BankConfig
    from .bank_index import KeyIndex as KeyIndex
    from .bank_rows import BankRows as BankRows
    from .key_encoder import KeyEncoder as KeyEncoder
    from .memory_bank import MemoryBank as MemoryBank
    from .row_encoder import RowEncoder as RowEncoder
    from .value_encoder import ValueEncoder as ValueEncoder


class TinyAlignModel(TinyAlignPreTrainedModel):
    """Vision tower, connectors and language model without its head. All fusion happens in `forward`."""

    _auto_class = "AutoModel"

    def __init__(self, config: TinyAlignConfig):
        super().__init__(config)
        if "num_attention_heads" not in config.vision_config.to_dict():  # a CNN would refuse "sdpa"
            config.vision_config._attn_implementation = "eager"
        self.vision_tower = build_part(config.vision_config, "vision_config")
        hidden_size = config.text_config.hidden_size
        self.connector = Connector(
            config.vision_feature_size, config.connector_size or hidden_size, hidden_size, config.projector_hidden_act
        )
        self.trains_vision_tower = False  # set by training, which then says which of its parameters do
        self.built_top_k = config.memory_top_k  # read_memory refuses another one: its weights have this shape
        if config.memory_top_k > 0:
            self.memory_connector = MemoryConnector(config)
        self.language_model = build_part(config.text_config, "text_config")
        self.post_init()

    def train(self, mode: bool = True):
        """Leave the vision tower frozen, unless `trains_vision_tower`, and in evaluation mode: its keys must stay."""
        super().train(mode)
        self.vision_tower.eval()
        self.get_input_embeddings().padding_idx = None  # often also the end token, whose gradient would be dropped
        if not self.trains_vision_tower:
            self.vision_tower.requires_grad_(False)
        return self

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(n, 3, H, W)` -> visual features `(n, T, C)`, which keys, value encoder and caches use."""
        return self._read_vision_tower(pixel_values)[0]

    def _read_vision_tower(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ModelOutput]:
        check_tensor("pixel_values", pixel_values, "(images, 3, height, width)")
        layer, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        with torch.set_grad_enabled(self.trains_vision_tower and torch.is_grad_enabled()):
            return read_vision_tower(self.vision_tower, pixel_values, layer, strategy, **kwargs)

    def _visual_tokens(self, vision_features: torch.Tensor) -> torch.Tensor:
        """Visual features `(n, T, C)` -> visual tokens `(n, P, hidden_size)`."""
        check_tensor("vision_features", vision_features, "(images, tokens, width)")
        pooled = pool_grid(vision_features, self.config.vision_pool_size)
        if pooled.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"An image has {pooled.shape[1]} visual tokens, expected config.image_seq_length = "
                f"{self.config.image_seq_length}. Check the image size, vision_pool_size and "
                "vision_feature_select_strategy."
            )
        return self.connector(pooled)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        memory_ids: torch.LongTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_values: torch.Tensor | None = None,
        memory_scores: torch.Tensor | None = None,
        exclude_ids: list | None = None,
        memory: Literal["on", "off"] | None = None,
        memory_top_k: int | None = None,
        retrieval_threshold: float | None = None,
        **kwargs,
    ) -> TinyAlignImageFeatures:
        r"""Return the visual and memory tokens of each image. Retrieval happens here, once an image, and nowhere else.

        Args:
            vision_features (`(n, T, C)`): What [`get_vision_features`] gave, instead of `pixel_values (n, 3, H, W)`.
            query_input_ids, query_attention_mask (`(n, Q)`): The question, for language-space keys.
            memory_ids, memory_scores (`(n, top_k)`): Rows of the bank to use, -1: none, and their similarities. Or
                what the model reads of them: `memory_input_ids (n, M)`, tokens of captions, -1: none, which no
                threshold leaves out, and `memory_values (n, top_k, L, D)`.
            exclude_ids: For each image `None`, a `source_id`, a row id or a list of them; or one id for all images.
            memory: `"off"` fills all slots with "nothing retrieved".
            memory_top_k, retrieval_threshold: In place of the config's; slots beyond stay empty.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Pass exactly one of pixel_values and vision_features.")
        known = self.config.memory_top_k > 0 and is_known(self.config, memory_input_ids, memory_values)
        check_retrieval(self.config, memory, memory_top_k, retrieval_threshold, known)
        tower = {}
        if vision_features is None:
            vision_features, tower = self._read_vision_tower(pixel_values, **kwargs)
        tokens, bank = self._visual_tokens(vision_features), None
        if self.config.memory_top_k > 0:
            given = {"memory_ids": memory_ids, "memory_scores": memory_scores}
            given |= {"memory_input_ids": memory_input_ids, "memory_values": memory_values}
            if memory == "off" or memory_top_k == 0:
                given = no_memory(self.config, tokens.shape[0])
            elif not known:
                queries, bank = (vision_features, query_input_ids, query_attention_mask), self.require_bank()
                found = self.look_up(bank, queries, memory_ids, memory_scores, exclude_ids, memory_top_k)
                given |= found if memory_values is None else found | {"memory_values": memory_values}
            memory_tokens, memory_ids, memory_scores = self.read_memory(tokens, retrieval_threshold, bank, **given)
            tokens = torch.cat([tokens, memory_tokens.to(tokens)], dim=1)
        elif any(value is not None for value in (memory_ids, memory_input_ids, memory_values)):
            raise ValueError("config.memory_top_k is 0, a model without memory: pass no memory_ids, nor what is read.")
        wanted = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        features = TinyAlignImageFeatures(
            last_hidden_state=vision_features,
            pooler_output=tokens if is_tracing(tokens) else list(tokens),  # a list fixes a graph's number of images
            hidden_states=tower.get("hidden_states") if wanted else None,
            attentions=tower.get("attentions"),
            memory_ids=memory_ids,
            memory_scores=memory_scores,
        )
        features.bank = bank
        return features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, TinyAlignImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TinyAlignModelOutputWithPast:
        """Take the inputs of [`get_image_features`], with a query a row, or its output in `mm_encoder_outputs`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        kwargs |= kwargs.pop("call_settings", None) or {}  # of a pipeline's call, through the processor
        images = (mm_encoder_outputs or {}).get("image")
        image_inputs = take_image_inputs(kwargs, images)
        if image_inputs is not None and images is not None:
            raise ValueError("You cannot specify both images and mm_encoder_outputs at the same time")
        # a graph can't raise, and without images embeddings are complete: vLLM runs those alone, and captures that
        checked = not is_tracing(input_ids if inputs_embeds is None else inputs_embeds)
        if image_inputs is not None or images is not None or input_ids is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if image_inputs is not None:
            images = self.get_image_features(**repeat_queries(self.config, image_inputs, mask), return_dict=True)
            if checked:
                images.pooler_output = uncached_images(self.config, images.pooler_output, mask, cache_of(kwargs))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None and (not checked or len(images.pooler_output)):
            features = images.pooler_output
            features = features.flatten(0, 1) if torch.is_tensor(features) else torch.cat(features)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            if checked and mask.sum() != len(features):
                raise ValueError(
                    f"Found {mask.sum()} image placeholders, expected {len(features)}, one per image token."
                )
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), features)
        elif input_ids is not None and checked and cache_of(kwargs) is None:
            check_no_placeholders(self.config, mask)

        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return TinyAlignModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state, image_outputs=images, **language_model_fields(outputs)
        )


class TinyAlignForConditionalGeneration(TinyAlignPreTrainedModel, GenerationMixin):
    """TinyAlign with the language model's head."""

    _auto_class = "AutoModelForImageTextToText"
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TinyAlignConfig):
        super().__init__(config)
        self.model = TinyAlignModel(config)
        embeddings = self.get_input_embeddings()  # named differently in every language model
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=config.lm_head_bias
        )
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_name_or_path: str, text_name_or_path: str, **kwargs
    ) -> "TinyAlignForConditionalGeneration":
        """Compose a model, whose connectors are new, as `tinyalign_vlm.training.composition.compose` says."""
        composition = installed_package("composition", "Composing a model")
        return composition.compose(cls, vision_name_or_path, text_name_or_path, **kwargs)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_vision_features(pixel_values)

    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs) -> TinyAlignImageFeatures:
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        memory_ids: torch.LongTensor | None = None,
        memory_input_ids: torch.LongTensor | None = None,
        memory_values: torch.Tensor | None = None,
        memory_scores: torch.Tensor | None = None,
        exclude_ids: list | None = None,
        memory: Literal["on", "off"] | None = None,
        mm_encoder_outputs: dict[str, TinyAlignImageFeatures] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        supervised_logits_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TinyAlignCausalLMOutputWithPast:
        """Take the image inputs of [`TinyAlignModel.get_image_features`] as well. With `labels`,
        `supervised_logits_only` computes logits `(supervised positions, vocab_size)` only where there is a label:
        several times faster with a large vocabulary, and the loss is the same.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            query_input_ids=query_input_ids,
            query_attention_mask=query_attention_mask,
            memory_ids=memory_ids,
            memory_input_ids=memory_input_ids,
            memory_values=memory_values,
            memory_scores=memory_scores,
            exclude_ids=exclude_ids,
            memory=memory,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(
            outputs.last_hidden_state, labels, logits_to_keep, supervised_logits_only, **kwargs
        )
        return TinyAlignCausalLMOutputWithPast(
            loss=loss, logits=logits, image_outputs=outputs.image_outputs, **language_model_fields(outputs)
        )

    def _logits_and_loss(self, hidden_states, labels, logits_to_keep, supervised_only, **kwargs):
        if labels is not None and supervised_only:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            supervised = shift_labels != -100
            hidden_states = hidden_states[supervised]
            kwargs["shift_labels"] = shift_labels[supervised]
        elif isinstance(logits_to_keep, int):
            # 0 keeps all; of a slice with gaps, torch would copy a frozen head once for each row of the batch
            hidden_states = hidden_states[:, -logits_to_keep:].contiguous()
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = finished_logits(self.lm_head(hidden_states), self.config.text_config)
        if labels is None:
            return logits, None
        return logits, self.loss_function(logits, labels, self.config.text_config.vocab_size, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, sources: list | bool | None = None, **kwargs):
        """Generate like [`GenerationMixin.generate`], with the inputs of [`TinyAlignModel.get_image_features`], which
        are encoded once. With `return_dict_in_generate=True` the output has `memory_ids` and `memory_scores` `(images,
        top_k)` as well. A chat goes on from a cache: whole, with all its images, or only with what is new.

        Args:
            sources: `True` returns `(outputs, sources)`: for each row the neighbours that were read, rows of
                [`MemoryBank.rows`] with their `score` and the number of their `image` in it. A list is filled with the
                same: a pipeline takes it in `generate_kwargs`, and returns text alone.
        """
        settings = merged_settings(kwargs.pop("call_settings", None))
        kwargs |= settings
        config = settings.get("generation_config")
        if config is not None and (config.max_new_tokens or config.max_length) and kwargs.get("max_new_tokens") == 256:
            del kwargs["max_new_tokens"]  # the default of a pipeline, which does not see the config
        images, mask = self._encode_images(inputs, kwargs)
        found = [] if sources is True else sources
        if isinstance(found, list) and mask is not None:
            reads = images is not None and images.memory_ids is not None and (images.memory_ids >= 0).any()
            found += sources_of((images.bank or self.memory_bank) if reads else None, images, mask)  # else opens none
        outputs = super().generate(inputs, *args, **kwargs)
        if images is not None and not torch.is_tensor(outputs):
            outputs["memory_ids"], outputs["memory_scores"] = images.memory_ids, images.memory_scores
        return (outputs, found) if sources is True else outputs

    def _encode_images(
        self, inputs: torch.Tensor | None, kwargs: dict
    ) -> tuple[TinyAlignImageFeatures | None, torch.Tensor | None]:
        """Put images of `kwargs` into it as `mm_encoder_outputs`; return them, and where in the prompt they go."""
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        image_inputs = take_image_inputs(kwargs, images)
        embeds, input_ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", inputs)
        if image_inputs is None and images is None and (embeds is not None or input_ids is None):  # they are complete
            return None, None
        mask = self.model.get_placeholder_mask(input_ids if embeds is None else None, embeds)
        attention_mask = kwargs.get("attention_mask")
        whole = attention_mask is None or attention_mask.shape[1] == mask.shape[1]  # prompt, also with a cache
        if image_inputs is None:
            if cache_of(kwargs) is None and images is None:
                check_no_placeholders(self.config, mask)
            return images, mask
        images = self.model.get_image_features(**repeat_queries(self.config, image_inputs, mask), return_dict=True)
        features = uncached_images(self.config, images.pooler_output, mask, cache_of(kwargs), whole)
        if features:
            kwargs["mm_encoder_outputs"] = {"image": TinyAlignImageFeatures(pooler_output=features)}
        return images, mask

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Images follow their row, which may have several: transformers 5.17 only repeats one image a row."""
        encoder_outputs = model_kwargs.pop("mm_encoder_outputs", None) or {}
        if encoder_outputs and expand_size > 1:
            images = encoder_outputs["image"]
            features = iter(images.pooler_output)
            embeds = model_kwargs.get("inputs_embeds")  # with them, input_ids are empty
            counts = self.model.get_placeholder_mask(input_ids if embeds is None else None, embeds).sum(1).tolist()
            rows = [list(islice(features, count // len(images.pooler_output[0]))) for count in counts]
            expanded = [feature for row in rows for feature in row * expand_size]
            encoder_outputs = {"image": TinyAlignImageFeatures(pooler_output=expanded)}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "mm_encoder_outputs": encoder_outputs}

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature says what `generate` takes
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """Image tokens go in with the prompt, and again only when there is no cache (5.17 does not know of them)."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            if kwargs.pop("mm_encoder_outputs", None) and "next_sequence_length" not in kwargs:  # a chunk, in 5.17
                raise ValueError("This transformers cannot prefill images in chunks: leave prefill_chunk_size out.")
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

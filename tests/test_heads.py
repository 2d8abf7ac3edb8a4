"""What "all-linear" leaves out, for every kind of head and router in transformers: a table of model classes."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, ViTConfig, Wav2Vec2Config

from hf_galore.param_groups import all_linear, find_targets

# What is left out, with N for numbers, and the classes of which that is all.
LEFT_OUT = {
    "cls.predictions.decoder cls.predictions.transform.dense": """
        BertLMHeadModel BertForMaskedLM DebertaV2ForMaskedLM LayoutLMForMaskedLM FNetForMaskedLM
        RoFormerForCausalLM RoFormerForMaskedLM""",
    "classifier": """
        BertForMultipleChoice BertForSequenceClassification BertForTokenClassification
        RobertaForMultipleChoice RobertaForTokenClassification XLMRobertaForMultipleChoice
        XLMRobertaForTokenClassification AlbertForMultipleChoice AlbertForSequenceClassification
        AlbertForTokenClassification ElectraForTokenClassification DistilBertForTokenClassification
        DebertaV2ForTokenClassification MPNetForMultipleChoice MPNetForTokenClassification
        CanineForMultipleChoice CanineForSequenceClassification CanineForTokenClassification
        XLNetForTokenClassification FunnelForTokenClassification MobileBertForMultipleChoice
        MobileBertForSequenceClassification MobileBertForTokenClassification
        LayoutLMForSequenceClassification LayoutLMForTokenClassification XLMForTokenClassification
        FNetForMultipleChoice FNetForSequenceClassification FNetForTokenClassification
        ConvBertForMultipleChoice ConvBertForTokenClassification RemBertForMultipleChoice
        RemBertForSequenceClassification RemBertForTokenClassification EsmForTokenClassification
        RoFormerForMultipleChoice RoFormerForTokenClassification GPT2ForTokenClassification
        CTRLForSequenceClassification BloomForTokenClassification FalconForTokenClassification
        BioGptForTokenClassification T5ForTokenClassification ViTForImageClassification
        DeiTForImageClassification Dinov2ForImageClassification SwinForImageClassification
        SegformerForImageClassification CLIPForImageClassification HieraForImageClassification
        Wav2Vec2ForAudioFrameClassification WavLMForAudioFrameClassification
        Data2VecAudioForAudioFrameClassification Wav2Vec2BertForAudioFrameClassification""",
    "cls.seq_relationship": """
        BertForNextSentencePrediction MobileBertForNextSentencePrediction
        FNetForNextSentencePrediction""",
    "cls.predictions.decoder cls.predictions.transform.dense cls.seq_relationship": """
        BertForPreTraining FNetForPreTraining""",
    "qa_outputs": """
        BertForQuestionAnswering RobertaForQuestionAnswering XLMRobertaForQuestionAnswering
        AlbertForQuestionAnswering ElectraForQuestionAnswering DistilBertForQuestionAnswering
        DebertaV2ForQuestionAnswering MPNetForQuestionAnswering CanineForQuestionAnswering
        XLNetForQuestionAnsweringSimple FunnelForQuestionAnswering MobileBertForQuestionAnswering
        LayoutLMForQuestionAnswering XLMForQuestionAnsweringSimple FNetForQuestionAnswering
        ConvBertForQuestionAnswering RemBertForQuestionAnswering RoFormerForQuestionAnswering
        GPT2ForQuestionAnswering LlamaForQuestionAnswering OPTForQuestionAnswering
        GPTJForQuestionAnswering BloomForQuestionAnswering FalconForQuestionAnswering
        MixtralForQuestionAnswering Qwen3MoeForQuestionAnswering T5ForQuestionAnswering
        BartForQuestionAnswering LEDForQuestionAnswering""",
    "lm_head.decoder lm_head.dense": """
        RobertaForCausalLM RobertaForMaskedLM XLMRobertaForCausalLM XLMRobertaForMaskedLM
        MPNetForMaskedLM EsmForMaskedLM""",
    "classifier.dense classifier.out_proj": """
        RobertaForSequenceClassification XLMRobertaForSequenceClassification
        ElectraForSequenceClassification MPNetForSequenceClassification
        ConvBertForSequenceClassification EsmForSequenceClassification
        RoFormerForSequenceClassification""",
    "predictions.decoder predictions.dense": "AlbertForMaskedLM",
    "predictions.decoder predictions.dense sop_classifier.classifier": "AlbertForPreTraining",
    "generator_lm_head generator_predictions.dense": "ElectraForCausalLM ElectraForMaskedLM ConvBertForMaskedLM",
    "classifier sequence_summary.summary": "ElectraForMultipleChoice",
    "discriminator_predictions.dense discriminator_predictions.dense_prediction": """
        ElectraForPreTraining FunnelForPreTraining""",
    "vocab_projector vocab_transform": "DistilBertForMaskedLM",
    "classifier pre_classifier": "DistilBertForMultipleChoice DistilBertForSequenceClassification",
    "classifier pooler.dense": "DebertaV2ForMultipleChoice DebertaV2ForSequenceClassification",
    "decoder head.dense": "ModernBertForMaskedLM",
    "classifier head.dense": """
        ModernBertForMultipleChoice ModernBertForQuestionAnswering
        ModernBertForSequenceClassification ModernBertForTokenClassification""",
    "lm_loss": "XLNetLMHeadModel",
    "logits_proj sequence_summary.summary": """
        XLNetForMultipleChoice XLNetForSequenceClassification XLMForMultipleChoice""",
    "lm_head": """
        FunnelForMaskedLM GPT2LMHeadModel OpenAIGPTLMHeadModel CTRLLMHeadModel LlamaForCausalLM
        OPTForCausalLM GPTJForCausalLM BloomForCausalLM FalconForCausalLM MambaForCausalLM
        XGLMForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM GptOssForCausalLM
        DeepseekV3ForCausalLM GraniteMoeForCausalLM
        NemotronHForCausalLM Ernie4_5_MoeForCausalLM JambaForCausalLM T5ForConditionalGeneration
        BartForCausalLM BartForConditionalGeneration MarianForCausalLM MarianMTModel
        LEDForConditionalGeneration ProphetNetForCausalLM ProphetNetForConditionalGeneration
        Wav2Vec2ForCTC HubertForCTC WavLMForCTC SEWForCTC Data2VecAudioForCTC
        Speech2TextForConditionalGeneration SeamlessM4TForTextToText SeamlessM4TForSpeechToText
        LlavaForConditionalGeneration Qwen2VLForConditionalGeneration
        PaliGemmaForConditionalGeneration Idefics3ForConditionalGeneration
        Qwen2_5OmniThinkerForConditionalGeneration Qwen2AudioForConditionalGeneration
        MllamaForCausalLM MllamaForConditionalGeneration""",
    "classifier.linear_hidden classifier.linear_out": "FunnelForMultipleChoice FunnelForSequenceClassification",
    "cls.predictions.decoder cls.predictions.dense cls.predictions.transform.dense": "MobileBertForMaskedLM",
    "cls.predictions.decoder cls.predictions.dense cls.predictions.transform.dense cls.seq_relationship": """
        MobileBertForPreTraining""",
    "answer_head.logit_fc.N": "LxmertForQuestionAnswering",
    "pred_layer.proj": "XLMWithLMHeadModel",
    "sequence_summary.summary": "XLMForSequenceClassification",
    "cls.predictions.decoder cls.predictions.dense": "RemBertForCausalLM RemBertForMaskedLM",
    "score": """
        GPT2ForSequenceClassification OpenAIGPTForSequenceClassification
        LlamaForSequenceClassification LlamaForTokenClassification OPTForSequenceClassification
        GPTJForSequenceClassification BloomForSequenceClassification FalconForSequenceClassification
        BioGptForSequenceClassification MixtralForSequenceClassification
        MixtralForTokenClassification Qwen3MoeForSequenceClassification
        Qwen3MoeForTokenClassification GptOssForSequenceClassification GptOssForTokenClassification
        DeepseekV3ForSequenceClassification DeepseekV3ForTokenClassification
        JambaForSequenceClassification""",
    "output_projection": "BioGptForCausalLM",
    "lm_head model.layers.N.mlp.shared_expert_gate": "Qwen2MoeForCausalLM",
    "model.layers.N.mlp.shared_expert_gate qa_outputs": "Qwen2MoeForQuestionAnswering",
    "model.layers.N.mlp.shared_expert_gate score": """
        Qwen2MoeForSequenceClassification Qwen2MoeForTokenClassification""",
    "lm_head model.layers.N.mlp.router.layer model.layers.N.self_attention.experts.router.layer": """
        JetMoeForCausalLM""",
    "model.layers.N.mlp.router.layer model.layers.N.self_attention.experts.router.layer score": """
        JetMoeForSequenceClassification""",
    "lm_head model.layers.N.feed_forward.router": "Llama4ForCausalLM",
    "lm_head model.layers.N.mlp.router": "PhimoeForCausalLM",
    "model.layers.N.mlp.router score": "PhimoeForSequenceClassification",
    "lm_head model.layers.N.mlp.router.classifier": "LongcatFlashForCausalLM",
    "classification_head.dense classification_head.out_proj": """
        T5ForSequenceClassification BartForSequenceClassification""",
    "": """
        ViTForMaskedImageModeling DeiTForMaskedImageModeling SwinForMaskedImageModeling CLIPModel
        SamModel RTDetrForObjectDetection""",
    "cls_classifier distillation_classifier": "DeiTForImageClassificationWithTeacher",
    "decode_head.linear_projections.N.proj": "SegformerForSemanticSegmentation",
    "neck.reassemble_stage.readout_projects.N.N": "DPTForDepthEstimation DPTForSemanticSegmentation",
    "bbox_predictor.layers.N class_labels_classifier.layers.N": "YolosForObjectDetection",
    "classifier.linear": "LevitForImageClassification",
    "classifier.linear classifier_distill.linear": "LevitForImageClassificationWithTeacher",
    "classifier projector": """
        Wav2Vec2ForSequenceClassification HubertForSequenceClassification
        WavLMForSequenceClassification SEWForSequenceClassification
        Data2VecAudioForSequenceClassification WhisperForAudioClassification
        Wav2Vec2BertForSequenceClassification""",
    "classifier feature_extractor projector tdnn.N.kernel": """
        Wav2Vec2ForXVector WavLMForXVector Data2VecAudioForXVector Wav2Vec2BertForXVector""",
    "project_hid project_q quantizer.weight_proj": "Wav2Vec2ForPreTraining",
    "proj_out": "WhisperForCausalLM WhisperForConditionalGeneration",
    "classifier.dense": "ASTForAudioClassification",
    "text_decoder_postnet.lm_head": "SpeechT5ForSpeechToText",
    "speech_decoder_postnet.feat_out speech_decoder_postnet.prob_out": "SpeechT5ForTextToSpeech",
    "decoder.lm_heads.N": """
        MusicgenForConditionalGeneration""",
    "classifier.N": "ViltForQuestionAnswering",
    "text_decoder.cls.predictions.decoder text_decoder.cls.predictions.transform.dense": """
        BlipForConditionalGeneration BlipForQuestionAnswering""",
    "language_model.lm_head": "Blip2ForConditionalGeneration",
    "itm_head text_projection vision_projection": "Blip2ForImageTextRetrieval",
    "output": "GitForCausalLM",
    "decoder.lm_head": "Pix2StructForConditionalGeneration",
    "text_model.lm_head": "Kosmos2ForConditionalGeneration",
    "decoder.block.N.layer.N.mlp.router.classifier encoder.block.N.layer.N.mlp.router.classifier lm_head": """
        SwitchTransformersForConditionalGeneration""",
}
# What makes models small; the default is one layer.
SMALL = {
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "bloom": {"n_layer": 1},
    "ctrl": {"n_layer": 1},
    "distilbert": {"n_layers": 1},
    "dpt": {"num_hidden_layers": 1, "backbone_out_indices": [0, 0, 0, 0]},
    "ernie4_5_moe": {"num_hidden_layers": 2},
    "esm": {"num_hidden_layers": 1, "vocab_size": 33, "pad_token_id": 1},
    "deepseek_v3": {"num_hidden_layers": 4},  # the last of them is a mixture
    "funnel": {"block_sizes": [1, 1]},
    "gpt2": {"n_layer": 1},
    "gptj": {"n_layer": 1},
    "hiera": {"depths": [1, 1, 1, 1]},
    "jamba": {"num_hidden_layers": 8},
    "led": {"encoder_layers": 1, "decoder_layers": 1, "attention_window": 4},
    "levit": {"depths": [1, 1, 1]},
    "longcat_flash": {"num_layers": 1},
    "lxmert": {"l_layers": 1, "x_layers": 1, "r_layers": 1},
    "marian": {"encoder_layers": 1, "decoder_layers": 1},
    "modernbert": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "nemotron_h": {},
    "openai-gpt": {"n_layer": 1},
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "seamless_m4t": {"encoder_layers": 1, "decoder_layers": 1, "speech_encoder_layers": 1},
    "rt_detr": {},
    "segformer": {"depths": [1, 1, 1, 1]},
    "speech_to_text": {"encoder_layers": 1, "decoder_layers": 1},
    "speecht5": {"encoder_layers": 1, "decoder_layers": 1},
    "swin": {"depths": [1, 1], "num_heads": [1, 1]},
    "switch_transformers": {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": {"num_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
    "xglm": {"num_layers": 1},
    "xlm": {"n_layers": 1},
    "xlnet": {"n_layer": 1},
}
CASES = {name: expected for expected, names in LEFT_OUT.items() for name in names.split()}


def linear_paths(model):
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
    }


def left_out(model):
    """Paths of the linear layers that "all-linear" does not stand for, with N for numbers."""
    return {re.sub(r"\.\d+(?=\.|$)", ".N", path) for path in linear_paths(model) - all_linear(model)}


@pytest.mark.parametrize("name", CASES)
def test_heads_and_routers_are_left_out(name):
    """And nothing else."""
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("newer than this transformers")
    config = cls.config_class
    with torch.device("meta"):
        model = cls(config(**SMALL.get(config.model_type, {"num_hidden_layers": 1})))
    assert left_out(model) == set(CASES[name].split())


def composite(kind, *parts):
    config = kind.config_class.from_encoder_decoder_configs(*parts)
    with torch.device("meta"):
        return kind(config=config)


TEXT = BertConfig(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=2, is_decoder=True, add_cross_attention=True
)
COMPOSITES = {
    "text": (transformers.EncoderDecoderModel, BertConfig(num_hidden_layers=1)),
    "vision": (transformers.VisionEncoderDecoderModel, ViTConfig(num_hidden_layers=1)),
    "speech": (transformers.SpeechEncoderDecoderModel, Wav2Vec2Config(num_hidden_layers=1)),
}


@pytest.mark.parametrize(("kind", "encoder"), COMPOSITES.values(), ids=COMPOSITES)
def test_a_connection_between_parts_is_no_head(kind, encoder):
    model = composite(kind, encoder, TEXT)
    assert left_out(model) == {"decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"}
    assert "enc_to_dec_proj" in all_linear(model)


def test_in_an_adapted_model():
    """The head is found below PEFT's wrappers."""
    from peft import LoraConfig, get_peft_model

    model = transformers.BertForQuestionAnswering(
        BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    )
    model = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["qa_outputs", "key"]))
    trained = "base_model.model.bert.encoder.layer.0.attention.self.key.modules_to_save.default.weight"
    assert find_targets(model, "all-linear") == {trained}


class Custom(nn.Module):
    """A model of nobody's library."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 8)


def test_other_models_are_asked_for_usual_names():
    assert find_targets(Custom(), "all-linear") == {"body.weight"}

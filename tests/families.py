"""A catalogue of families: real classes of transformers, small, with random weights large enough that all counts."""

import torch
import transformers

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHARED = SIZES | dict(num_key_value_heads=2)
WIDE = SHARED | dict(head_dim=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2)
EXPERTS = WIDE | dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=["linear_attention", "full_attention"])

# name in the table: (config class, arguments)
CATALOGUE = {
    "GPT-2": ("GPT2Config", GPT),
    "OPT": ("OPTConfig", SIZES | dict(ffn_dim=64, word_embed_proj_dim=32)),
    "GPT-NeoX, Pythia": ("GPTNeoXConfig", SIZES),
    "Llama, SmolLM2": ("LlamaConfig", WIDE),
    "Mistral": ("MistralConfig", WIDE),
    "Ministral": ("MinistralConfig", WIDE),
    "Qwen 2": ("Qwen2Config", SHARED),
    "Qwen 3": ("Qwen3Config", WIDE),
    "Qwen 3.5": ("Qwen3_5TextConfig", WIDE | LINEAR),
    "Gemma": ("GemmaConfig", WIDE),
    "Gemma 2": ("Gemma2Config", WIDE),
    "Gemma 3": ("Gemma3TextConfig", WIDE),
    "VaultGemma": ("VaultGemmaConfig", WIDE),
    "RecurrentGemma": ("RecurrentGemmaConfig", SHARED | dict(lru_width=32, block_types=["recurrent", "attention"])),
    "Phi": ("PhiConfig", SIZES),
    "Phi-3": ("Phi3Config", SHARED),
    "SmolLM3": ("SmolLM3Config", SHARED),
    "OLMo": ("OlmoConfig", SHARED),
    "OLMo 2": ("Olmo2Config", SHARED),
    "OLMo 3": ("Olmo3Config", SHARED),
    "Granite": ("GraniteConfig", SHARED | dict(logits_scaling=8.0, residual_multiplier=0.5)),
    "GLM": ("GlmConfig", WIDE),
    "GLM-4": ("Glm4Config", WIDE),
    "Nemotron": ("NemotronConfig", WIDE),
    "Cohere": ("CohereConfig", SHARED),
    "Cohere, queries and keys normalised": ("CohereConfig", SHARED | dict(use_qk_norm=True)),
    "Cohere 2": ("Cohere2Config", SHARED),
    "StarCoder2": ("Starcoder2Config", SHARED),
    "StableLM": ("StableLmConfig", SHARED),
    "StableLM, a norm for every head": ("StableLmConfig", SHARED | dict(qk_layernorm=True)),
    "Helium": ("HeliumConfig", WIDE),
    "EXAONE 4": ("Exaone4Config", SHARED),
    "Arcee": ("ArceeConfig", WIDE),
    "Seed-OSS": ("SeedOssConfig", WIDE),
    "Ernie 4.5": ("Ernie4_5Config", WIDE),
    "Hunyuan": ("HunYuanDenseV1Config", WIDE),
    "Apertus": ("ApertusConfig", SHARED),
    "Persimmon": ("PersimmonConfig", SIZES),
    "BLOOM": ("BloomConfig", dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2)),
    "Falcon 40B": ("FalconConfig", SIZES | dict(num_kv_heads=2, new_decoder_architecture=True)),
    "Falcon 7B": ("FalconConfig", SIZES | dict(multi_query=True, new_decoder_architecture=False)),
    "Falcon RW": ("FalconConfig", SIZES | dict(multi_query=False, new_decoder_architecture=False, alibi=True)),
    "GPT-J": ("GPTJConfig", GPT | dict(rotary_dim=4)),
    "GPT-Neo": ("GPTNeoConfig", dict(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=97, max_position_embeddings=64, window_size=16,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)),
    "CodeGen": ("CodeGenConfig", GPT | dict(rotary_dim=4)),
    "GPTBigCode": ("GPTBigCodeConfig", GPT),
    "GPTBigCode, no shared keys": ("GPTBigCodeConfig", GPT | dict(multi_query=False)),
    "BioGPT": ("BioGptConfig", SIZES),
    "MPT": ("MptConfig", dict(d_model=32, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64, expansion_ratio=2)),
    "GPT": ("OpenAIGPTConfig", GPT),
    "XGLM": ("XGLMConfig", dict(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, vocab_size=97,
                                max_position_embeddings=64)),
    "BitNet": ("BitNetConfig", SHARED),
    "DiffLlama": ("DiffLlamaConfig", SHARED),
    "Mixtral": ("MixtralConfig", EXPERTS),
    "Qwen 2 MoE": ("Qwen2MoeConfig", SHARED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                                   shared_expert_intermediate_size=32)),
    "Qwen 3 MoE": ("Qwen3MoeConfig", EXPERTS),
    "Qwen 3 Next": ("Qwen3NextConfig", EXPERTS | LINEAR | dict(shared_expert_intermediate_size=32)),
    "OLMoE": ("OlmoeConfig", SHARED | dict(num_experts=4, num_experts_per_tok=2)),
    "FlexOlmo": ("FlexOlmoConfig", SHARED | dict(num_experts=4, num_experts_per_tok=2)),
    "Phi-3.5 MoE": ("PhimoeConfig", EXPERTS),
    "Granite MoE": ("GraniteMoeConfig", SHARED | dict(num_local_experts=4, num_experts_per_tok=2)),
    "GPT-OSS": ("GptOssConfig", EXPERTS),
    "MiniMax": ("MiniMaxConfig", EXPERTS | dict(layer_types=["linear_attention", "full_attention"], block_size=8)),
    "MiniMax M2": ("MiniMaxM2Config", EXPERTS),
    "Llama 4": ("Llama4TextConfig", EXPERTS | dict(intermediate_size_mlp=64)),
    "DBRX": ("DbrxConfig", dict(
        d_model=32, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=32))),
    "DeepSeek V3": ("DeepseekV3Config", SIZES | dict(
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1,
        first_k_dense_replace=1)),
    "LFM2": ("Lfm2Config", SHARED | dict(layer_types=["conv", "full_attention"])),
    "Jamba": ("JambaConfig", SHARED | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                                           use_mamba_kernels=False)),
    "Gemma 3, with images": ("Gemma3Config", dict(
        text_config=WIDE | dict(model_type="gemma3_text"),
        vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=16, patch_size=8),
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92)),
    "Qwen 2 VL": ("Qwen2VLConfig", dict(
        text_config=SHARED | dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2),
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)),
    "Mamba": ("MambaConfig", dict(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=4)),
}
# what cannot be cut, and the words of the reason
KEEP_THEIR_GATES = {
    "BLOOM": "cut, it fails",  # the code takes as many heads as it takes numbers
    "Falcon RW": "cut, it fails",  # ALiBi: a slope for each head, in one table for all layers
    "MPT": "cut, it fails",  # likewise
    "StableLM, a norm for every head": "its logits differ",  # a list of norms, one for each head
    "CodeGen": "cut, it",  # the code takes heads in four equal parts
    "GPTBigCode, no shared keys": "cut, it",  # heads stand in another order than with shared keys
    "BitNet": "fails",  # one norm over all heads stands before the output projection
    "DiffLlama": "its logits differ",  # two heads are subtracted from each other
    "MiniMax": "fails",  # linear attention, whose output is normalised over all heads
    "DeepSeek V3": "none that is known",  # latent attention: keys and values of all heads come from one vector
}


def make(name: str, seed: int = 0, **changes):
    """A small random model of the catalogue, in evaluation mode."""
    config, arguments = CATALOGUE[name]
    config = getattr(transformers, config)(**(arguments | changes))
    torch.manual_seed(seed)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: equal ones would hide a wrong one
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model

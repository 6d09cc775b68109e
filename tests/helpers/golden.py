"""The parameter counts that every way of counting must give."""

PARAMETERS = {
    "gpt2_124m": 124_373_760,
    "llama_124m": 162_220_800,
    "team_124m": 162_220_800,
    "hybrid_124m": 123_587_328,
    "custom": 123_587_328,
    "gpt2_openai_124m": 124_439_808,
    "quick_test": 30_036_864,
    "gpt2_owt": 124_373_760,
    "llama_0.41b_24gb": 411_354_112,
    "llama_1.36b": 1_364_297_728,
    "gpt2_1.36b": 1_365_612_544,
    # 6 (4 C^2 + 8 C^2 + 2 C) + C + (320 + 256) C at C = 384; 4 (12 C^2 + 2 C) + C + 320 C at C = 128.
    "shakespeare_char": 10_843_008,
    "tiny": 828_544,
}

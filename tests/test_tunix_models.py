import numpy as np

from jdmdr.llm import tunix_models


def test_llama_3_1_bends_the_frequencies_of_long_waves_alone():
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    plain = tunix_models.frequencies({"rope_type": "default", "rope_theta": 500_000.0}, 128)
    bent = tunix_models.frequencies(rope, 128)
    expected = []
    for f in 500_000.0 ** (-np.arange(0, 128, 2) / 128):
        wave = 2 * np.pi / f
        share = (8192 / wave - 1.0) / (4.0 - 1.0)
        expected.append(f if wave < 8192 / 4 else f / 8 if wave > 8192 else (1 - share) * f / 8 + share * f)
    np.testing.assert_allclose(bent, expected, rtol=1e-12)
    assert np.all(bent[:20] == plain[:20]) and np.allclose(bent[-10:], plain[-10:] / 8)
    assert np.any((bent < plain) & (bent > plain / 8))

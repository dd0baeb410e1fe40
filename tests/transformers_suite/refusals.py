"""
Common tests of transformers that our classes fail on purpose: pattern of `class::test` (as of `fnmatch`) -> reason.

They are run, and reported as refused. One that passes is a failure, so that the list stays true.
"""

MISSING = (
    "Missing weights are an error of `from_pretrained`, not a warning: a tower initialised anew gives masks that look like "
    "masks. `…_once_accepted` runs the test with the loading of transformers."
)
NO_HEAD = (
    "The folder of a vision model holds neither text tower nor trained head, so it cannot be loaded as a model with one. "
    "The error names `from_spar`, `bake_vocabulary` or `AutoModel`."
)
SAVED_AS_SPAR = (
    "`SparSemanticModel` is what `AutoModel` makes of a folder with a linear head: the vision model without it, whose "
    "configuration is a `SparConfig`. It is saved as a `spar` folder, and that is loaded as `SparVisionModel`."
)

REFUSALS: dict[str, str] = {
    "*::test_can_init_all_missing_weights": MISSING,
    "*::test_model_weights_reload_no_missing_tied_weights": MISSING,
    "SparFor*::test_correct_missing_keys": NO_HEAD,
    "SparForOpenVocabSegmentation_*::test_base_model_prefix_loads_base_weights": NO_HEAD,
    "*_maskclip::test_attention_outputs": (
        "MaskCLIP's last block has no attention in the dense path (every token attends to itself), so `attentions` has one "
        "entry less than there are blocks. The test counts blocks."
    ),
    "SparBackbone_*::test_config": (
        "A stage follows the encoder's: `features`, the dense features of the read-out. The test wants `stageN` last."
    ),
    "SparBackbone_*::test_retain_grad_hidden_states_attentions": (
        "The test takes the first output for a tensor; that of a backbone is the tuple of its feature maps. Backbones of "
        "transformers skip it."
    ),
    **{
        f"SparSemanticModel_*::test_{name}": SAVED_AS_SPAR
        for name in (
            "attention_outputs",
            "bc_torch_dtype",
            "can_use_safetensors",
            "eager_matches_sdpa_inference_*",
            "gradient_checkpointing_backward_compatibility",
            "load_contiguous_weights",
            "load_save_without_tied_weights",
            "model_weights_reload_no_missing_tied_weights_once_accepted",
            "save_load",
            "sdpa_can_dispatch_non_composite_models",
        )
    },
    "*ImageProcessor::test_call_numpy_4_channels": (
        "The models see RGB. With `do_convert_rgb=False` an image of four channels is refused instead of handed on to a "
        "patch embedding that cannot read it."
    ),
    "*ImageProcessor::test_new_models_require_torchvision_backend": (
        "Pillow is the only resizer, so that an image gives the same features whether torchvision is installed or not."
    ),
    "*ImageProcessor::test_pil_can_run_without_torchvision": (
        "It loads the folder in a new process that does not import `spar_hf`, where transformers asks whether to trust the "
        "folder's code. There is no torchvision here in the first place."
    ),
    "Processor::test_processor_text_has_no_visual": (
        "Texts and images are not paired, so images are a flat list: nested lists, one per text, are for chat models."
    ),
}

"""ImageNet-1k top-1 accuracy in per cent that the papers report for their released weights."""

TOP1: dict[str, float] = {
    "vanilla_vmamba_tiny.in1k": 82.2,
    "vanilla_vmamba_small.in1k": 83.5,
    "vanilla_vmamba_base.in1k": 83.7,
    "vmamba_tiny_s2l5.in1k": 82.5,
    "vmamba_small_s2l15.in1k": 83.6,
    "vmamba_base_s2l15.in1k": 83.9,
    "vmamba_tiny_s1l8.in1k": 82.6,
    "vmamba_small_s1l20.in1k": 83.3,
    "vmamba_base_s1l20.in1k": 83.8,
    "mambavision_tiny.in1k": 82.3,
    "mambavision_tiny2.in1k": 82.7,
    "mambavision_small.in1k": 83.3,
    "mambavision_base.in1k": 84.2,
    "mambavision_base.in21k_ft_in1k": 84.9,
    "mambavision_large.in1k": 85.0,
    "mambavision_large.in21k_ft_in1k": 86.1,
    "mambavision_large2.in1k": 85.3,
    "mambavision_large2_512.in21k_ft_in1k": 87.3,
    "mambavision_large3.in21k_ft_in1k": 87.3,
    "mambavision_large3_512.in21k_ft_in1k": 88.1,
}

"""Networks: loading, scalar heads, sampling. Nothing in here knows Lightning."""

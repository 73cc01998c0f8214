import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may wait for a download

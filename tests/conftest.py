import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may wait for a download
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: -n 2 fills two cores with one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A classifier's service in one image: Triton with the model repository baked in.
# make_image.sh fills the build context: model_repository/, this file, nothing else.
# The last Triton with TensorRT 10, the one that serve.sh runs.
FROM nvcr.io/nvidia/tritonserver:26.05-py3

# tokenizer, graph and code are all in here, so nothing is fetched at start
COPY --chown=0:0 model_repository /models

# the server must not write beside the models, nor reach out for a cache
ENV PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1

EXPOSE 8000 8001 8002

# the base image's own user triton-server, by number so that a cluster can prove it is not root
USER 1000:1000

# python3 is there for the Python backend; curl may leave the base image
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]

CMD ["tritonserver", "--model-repository=/models", "--exit-timeout-secs=10"]

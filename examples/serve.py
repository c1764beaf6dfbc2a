"""A network behind FastAPI, by the engine or by onnxruntime: python examples/serve.py FOLDER writes it for both.

Then NETWORK=FOLDER/network.engine uvicorn --app-dir examples serve:app --workers 2; both ways .npy files go.
"""

import os
import sys
from io import BytesIO

import numpy as np
import onnxruntime
import torch
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from rarefy import engine, models, onnx_files

app, path = FastAPI(), os.environ.get("NETWORK", "")  # once in each worker
if path.endswith(".engine"):
    compiled = engine.load(path, mmap=True)  # compiled for one thread; the workers share its weights
elif path:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Answer with the network's output."""
    x, answer = np.load(BytesIO(await request.body())), BytesIO()
    if path.endswith(".engine"):
        y = (await run_in_threadpool(compiled, torch.from_numpy(x))).numpy()
    else:
        (y,) = await run_in_threadpool(session.run, None, {session.get_inputs()[0].name: x})
    np.save(answer, y)
    return Response(answer.getvalue(), media_type="application/octet-stream")


if __name__ == "__main__":
    model, example = models.resnet20().eval(), torch.randn(1, 3, 32, 32)
    engine.save(engine.compile(model, example, threads=1), f"{sys.argv[1]}/network.engine")
    onnx_files.save_onnx(model, example, f"{sys.argv[1]}/network.onnx")

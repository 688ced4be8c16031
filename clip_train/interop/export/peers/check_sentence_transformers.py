"""Features by sentence-transformers, from the exported folder."""

import torch
from peer_io import FOLDER, read_files, read_tensors, write_features
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(str(FOLDER), device="cpu")
pixels, tokens = map(torch.from_numpy, read_tensors())
pictures, texts = read_files()
with torch.no_grad():
    write_features(
        image=model({"pixel_values": pixels, "modality": "image"})["sentence_embedding"],
        text=model({"input_ids": tokens, "modality": "text"})["sentence_embedding"],
        file_image=model.encode([picture.convert("RGB") for picture in pictures], show_progress_bar=False),
        file_text=model.encode(texts, show_progress_bar=False),
    )

"""What families are put together from: U-Net, autoencoder, CLIP and T5 as data, and how their files are read and written."""

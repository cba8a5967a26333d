// SPDX-License-Identifier: Apache-2.0
import RunFiles
import Testing

@Suite struct CheckpointFileTests {
    @Test(
        arguments: [
            ("net_cp=latest_model.th", "net", "latest", "model", nil),
            ("net_ema=0.99_cp=E1_U200_S800_model.th", "net_ema=0.99", "E1_U200_S800", "model", 200),
            ("net.encoder_cp=E12_optim.th", "net.encoder", "E12", "optim", nil),
            ("a_cp=b_cp=U7_trainer.th", "a_cp=b", "U7", "trainer", 7),
            ("strange.th", "strange", "", "", nil),
        ] as [(String, String, String, String, Int64?)])
    func namesAreTakenApart(file: String, name: String, tag: String, kind: String, update: Int64?) {
        let found = CheckpointFile(file, byteCount: 1, modifiedAt: 2)
        #expect((found.name, found.tag, found.kind, found.update) == (name, tag, kind, update))
    }
}

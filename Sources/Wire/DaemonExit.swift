// SPDX-License-Identifier: Apache-2.0
/// What the exit status of noether-writerd tells the client that has started it.
public enum DaemonExit {
    /// A living daemon serves the socket already: another trainer was faster (EX_TEMPFAIL of sysexits.h).
    public static let alreadyServed: Int32 = 75
}
